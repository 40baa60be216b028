"""The commands of `dual-slm`: one module each, with a `register(subparsers)` that declares its arguments.

A module imports torch and the rest of the package inside its functions, so that `--help` stays fast.
"""
