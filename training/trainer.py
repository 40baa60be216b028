"""Training through the frozen LLM: one stage of the paper (section III-C) is one run of `DualSLMTrainer`."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import Seq2SeqTrainer, TrainerCallback

from .collator import Item, TrainingCollator
from .corpora.schema import share
from .err import Sources, draw_sources
from .recipe import StageRecipe
from .tasks import KINDS, TASKS, label_sets, make_sample, tasks_of
from .warm_start import TRIM_EVERY, label_losses, label_rows, trim_heap

BUCKET_SPAN = 32  # batches whose rows are sorted by length together: not all, so they differ from epoch to epoch
EAGER_LIMIT = 4 * 2**30  # bytes of attention weights that a batch may keep


class StageDataset(Dataset):
    """Rows as the items of one stage, those of rare corpora repeated if the stage says so. An item is a function of (seed,
    epoch, row) alone, whoever asks for it.

    Args:
        rows: with audio and features.
        stage: its tasks with their shares, and how sources are drawn.
        seed: of every draw.
        positional_randomness: see `tasks.make_sample`.
        teacher: (corpus, row id, augmented copy) -> the frozen LLM's log-probabilities of a dialogue's target.
        choices: the labels that prompts offer, as `tasks.label_sets`; default: those of the rows.
    """

    def __init__(
        self,
        rows: list[dict],
        stage: StageRecipe,
        seed: int,
        positional_randomness: bool = True,
        teacher=None,
        choices: dict[tuple[str, str], list[str]] | None = None,
    ):
        self.stage, self.seed = stage, seed
        self.positional_randomness, self.teacher = positional_randomness, teacher
        self.choices = choices or label_sets(rows)
        self.rows = [row for row in rows if self._weights(row) for _ in range(stage.repeat.get(row["corpus"], 1))]
        if not self.rows:
            raise ValueError(f"stage {stage.name}: no row has a target for any of {', '.join(stage.tasks)}.")
        if stage.balanced:
            self.rows = balance(self.rows, seed)
        counts: Counter = Counter()
        self.copies = []  # which one of its repetitions each row is: they are drawn apart
        for row in self.rows:
            self.copies.append(counts[row["id"], row.get("augment")])
            counts[row["id"], row.get("augment")] += 1

    def _weights(self, row: dict) -> dict[str, float]:
        return {task: self.stage.tasks[task] for task in tasks_of(row) if self.stage.tasks.get(task, 0) > 0}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        row, epoch = self.rows[index], epoch + 1_000_003 * self.copies[index]
        weights = self._weights(row)
        draw = random.Random(f"task/{self.seed}/{epoch}/{row['id']}/{row.get('augment')}")
        task = draw.choices(list(weights), list(weights.values()))[0]
        return self.item(row, task, epoch)

    def item(self, row: dict, task: str, epoch: int = 0) -> Item:
        sample = make_sample(row, task, self.choices, self.seed, epoch, self.positional_randomness, self.stage.facts)
        part = next(part for part in sample.messages[-1]["content"] if part["type"] == "audio")
        sources = draw_sources(
            sample.kind,
            self.stage.err_stage,
            self.seed,
            epoch,
            f"{row['id']}/{row.get('augment')}",
            err=self.stage.err,
            replaced_share=self.stage.replaced_share,
            has_caption="caption" in part,
            has_transcript="transcript" in part,
        )
        sources = with_stage_sources(sources, self.stage, row)
        taught = self.teacher is not None and task == "dialogue"
        teacher = self.teacher((row["corpus"], row["id"], row.get("augment"))) if taught else None
        return Item(sample, row, sources, teacher)

    def size(self, index: int, epoch: int = 0) -> int:
        """About how many positions a row takes in the LLM in an epoch, its history as it is cut then: in letters."""
        item = self[epoch, index]
        letters = len(item.sample.target) + len(item.row["transcript"] or "")
        for message in item.sample.messages:
            parts = message["content"]
            letters += len(parts) if isinstance(parts, str) else sum(len(part.get("text", "")) for part in parts)
        return letters


def balance(rows: list[dict], seed: int) -> list[dict]:
    """Rows of rarer emotions repeated until each emotion has as many as the most frequent one."""
    groups: dict[str | None, list[dict]] = {}
    for row in sorted(rows, key=lambda row: share(row["id"], seed)):
        groups.setdefault(row["emotion"], []).append(row)
    most = max(map(len, groups.values()))
    return [group[n % len(group)] for _, group in sorted(groups.items(), key=str) for n in range(most)]


def with_stage_sources(sources: Sources, stage: StageRecipe, row: dict) -> Sources:
    """What a stage has in the place of speech: the transcript as text (EmoSLLM), or nothing (ablations). A row that is
    `voice_only` always has its voice from speech and its words as text, whatever ERR drew."""
    how, what, train_how, train_what = sources
    if row["voice_only"]:
        how, what, train_how, train_what = "speech", "transcript", True, False
    if stage.paralinguistic_source == "none":
        how, train_how = "none", False
    if stage.linguistic_source != "speech":
        train_what = False
        if stage.linguistic_source == "none" or not row["transcript"]:
            what = "none"
        elif what == "speech":
            what = "transcript"
    return Sources(how, what, train_how, train_what)


class BucketSampler:
    """Batches of similar size in random order, by (seed, epoch) alone; the last, incomplete batch is left out.

    Args:
        dataset: has `size(index, epoch)`.
        batch_size: of all processes together.
        bucketing: without it, plain random batches (benchmark).
    """

    drop_last = True

    def __init__(self, dataset: StageDataset, batch_size: int, seed: int, bucketing: bool = True):
        if len(dataset) < batch_size:
            raise ValueError(f"a batch of {batch_size} is larger than the {len(dataset)} rows of the stage.")
        self.dataset, self.batch_size, self.seed, self.bucketing = dataset, batch_size, seed, bucketing
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draw = random.Random(f"batches/{self.seed}/{self.epoch}")
        order = list(range(len(self.dataset)))
        draw.shuffle(order)
        order = order[: len(self) * self.batch_size]
        if self.bucketing:
            sizes = {index: self.dataset.size(index, self.epoch) for index in order}
            span = BUCKET_SPAN * self.batch_size
            order = [
                i
                for start in range(0, len(order), span)
                for i in sorted(order[start : start + span], key=sizes.__getitem__)
            ]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        draw.shuffle(batches)
        epoch = self.epoch
        for batch in batches:
            yield [(epoch, index) for index in batch]


class DualSLMTrainer(Seq2SeqTrainer):
    """Trains the adapters through the frozen LLM.

    Beside `Seq2SeqTrainer`: losses and token accuracies of each task, rates for each branch, a share of the warm start's
    losses kept, KL to the frozen LLM, generation from the prompt alone, no step without a gradient for any adapter, and
    checkpoints that are known to be complete.

    Args:
        stage: objective, rates and shares.
        evaluation_collator: adds prompts to generate from.
        kwargs: of `Seq2SeqTrainer`; `train_dataset` is a [`StageDataset`], `eval_dataset` a list of [`Item`],
            `data_collator` a [`TrainingCollator`].
    """

    def __init__(self, *args, stage: StageRecipe, evaluation_collator: TrainingCollator | None = None, **kwargs):
        self.stage, self.evaluation_collator = stage, evaluation_collator
        super().__init__(*args, **kwargs)
        self._meters = {mode: torch.zeros(len(TASKS) + 2, 3, dtype=torch.float64) for mode in ("train", "eval")}
        if stage.caption_share and self.processing_class.caption_slots is None:
            if not self.processing_class.attribute_labels:
                raise ValueError(
                    f"stage {stage.name}: caption_share keeps what stage 0 taught, and these adapters were taught neither a "
                    "caption nor labels: set it to 0."
                )
            self._anchors = list(label_rows(self.model, self.processing_class).values())
        self.add_callback(_CompleteCheckpoints())
        self.add_callback(_TrimmedHeap())
        taught = set()  # kinds of tasks that something learns from
        for name, parameter in self.model.named_parameters():
            if "_adapter." in name or ".lora_" in name:
                parameter.requires_grad_(self._rate(name) > 0)
                if parameter.requires_grad:  # LoRA learns from every task, an adapter from its own and from dialogues
                    taught |= set(KINDS.values()) if ".lora_" in name else {name.split("_adapter")[0], "dual"}
        if not taught:
            raise ValueError(
                f"stage {stage.name}: nothing learns, as the rates of all that there is are 0. Give a learning_rate, or "
                "add what its residual_learning_rate is for (model.config.*_soft_residual)."
            )
        idle = [task for task in stage.tasks if KINDS[task] not in taught]
        if idle and stage.err and stage.err_stage != "joint":
            raise ValueError(
                f"stage {stage.name}: {', '.join(idle)} would teach nothing, as ERR lets a task train its own adapter alone "
                "and that one is frozen: leave it out, or give the adapter a rate."
            )

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        world = self.args.world_size
        sampler = BucketSampler(
            self.train_dataset, self.args.per_device_train_batch_size * world, self.args.data_seed or self.args.seed
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=False,
        )
        loader = self.accelerator.prepare(loader)
        # A run that goes on in a later epoch tells the loader, which looks for `set_epoch` on its own sampler alone.
        if loader.batch_sampler is not sampler:
            loader.batch_sampler.set_epoch = sampler.set_epoch
        return loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        collator, self.data_collator = self.data_collator, self.evaluation_collator or self.data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    # ---- optimiser ----

    def _rate(self, name: str) -> float:
        """The learning rate of a parameter. What has none (0) is frozen for the stage: its adapter hears as it heard."""
        branch = name.split("_adapter")[0]
        if branch == "linguistic" and self.processing_class.linguistic_adapter_type == "letters":
            return 0.0  # no gradient comes back through its words
        rates = [getattr(self.stage, f"{branch}_learning_rate", None), self.args.learning_rate]
        if ".residual." in name:
            rates.insert(0, self.stage.residual_learning_rate)
        if ".lora_" in name:
            rates.insert(0, self.stage.lora_learning_rate)
        return next(rate for rate in rates if rate is not None)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW over the adapters: a rate for each branch, no decay of norms, biases and vectors."""
        if self.optimizer is None:
            groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((self._rate(name), parameter.ndim > 1), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": parameters, "lr": rate, "weight_decay": self.args.weight_decay if decays else 0.0}
                    for (rate, decays), parameters in groups.items()
                ],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    # ---- loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of a target token over the whole batch, all processes together, and the shares that are kept."""
        tasks = inputs["task_ids"]
        model_inputs = {
            key: value
            for key, value in inputs.items()
            if not key.startswith(("prompt_", "teacher_", "ctc_", "caption_")) and key != "task_ids"
        }
        with fitted_attention(self.accelerator.unwrap_model(model).language_model):
            output = model(**model_inputs, only_targets=True)
        known = output.labels != -100
        logits, labels = output.logits.float(), output.labels[known]
        log_probs = logits.log_softmax(-1)
        token_loss = -log_probs.gather(-1, labels[:, None])[:, 0]
        owner = tasks[:, None].expand_as(output.labels)[known]
        mode = "train" if model.training else "eval"
        self._count(mode, owner, token_loss, logits.argmax(-1) == labels)
        if "teacher_ids" in inputs and self.stage.objective != "ce":
            token_loss = self._with_teacher(token_loss, log_probs, inputs["teacher_ids"], inputs["teacher_log_probs"])
        processes = self.accelerator.num_processes if mode == "train" else 1
        if num_items_in_batch is None:
            loss = token_loss.mean()
        else:
            loss = token_loss.sum() / num_items_in_batch
            loss = loss * processes if self.args.average_tokens_across_devices else loss
        kept = self._kept_losses(output.audio_features, inputs, mode)
        loss = loss + kept / (self.current_gradient_accumulation_steps if mode == "train" else 1)
        if mode == "train":
            # A batch may hold one kind of task alone: the other adapter's gradient is zero then, not missing.
            loss = loss + 0.0 * sum(p.sum() for p in self.model.parameters() if p.requires_grad)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1} of stage {self.stage.name}: lower the "
                    "learning rate. The checkpoints so far are kept."
                )
        return (loss, output) if return_outputs else loss

    def _with_teacher(self, token_loss, log_probs, ids, teacher) -> torch.Tensor:
        """KL(frozen LLM || model) over the teacher's most likely tokens, where there is a teacher."""
        has = torch.isfinite(teacher[:, 0])
        weights = teacher.masked_fill(~has[:, None], 0.0).softmax(-1)
        divergence = (weights * (weights.clamp(min=1e-9).log() - log_probs.gather(-1, ids))).sum(-1)
        if self.stage.objective == "kl":
            return torch.where(has, divergence, token_loss)
        return token_loss + torch.where(has, divergence, 0.0)

    def _kept_losses(self, audio, inputs, mode: str) -> torch.Tensor:
        """The share of the warm start's own losses that is kept, per sample of the batch."""
        total = torch.zeros((), device=inputs["task_ids"].device)
        size = len(inputs["task_ids"])
        trained = inputs["audio_trained"].bool() & inputs["audio_branches"].bool()
        if "ctc_labels" in inputs and audio.linguistic_logits is not None:
            heard = inputs["audio_branches"].bool()[:, 1]
            learns = trained[heard, 1] & inputs["ctc_known"][heard]
            labels = inputs["ctc_labels"][heard][learns]
            target_lengths = (labels != -100).sum(-1)
            if len(labels):
                losses = nn.functional.ctc_loss(
                    audio.linguistic_logits.float().log_softmax(-1).transpose(0, 1),
                    labels.clamp(min=0),
                    audio.linguistic_placeholders[learns],
                    target_lengths,
                    blank=audio.linguistic_logits.shape[-1] - 1,
                    reduction="none",
                    zero_infinity=True,
                ) / target_lengths.clamp(min=1)
                total = total + self.stage.ctc_share * losses.sum() / size
                self._add(mode, len(TASKS), losses)
        if "caption_labels" in inputs and audio.paralinguistic_embeds is not None:
            heard = inputs["audio_branches"].bool()[:, 0]
            labels, learns = inputs["caption_labels"][heard], trained[heard, 0]
            if audio.paralinguistic_logits is None:
                losses = label_losses(audio.paralinguistic_embeds, labels, self._anchors)
            else:
                losses = nn.functional.cross_entropy(
                    audio.paralinguistic_logits.float().flatten(0, 1),
                    labels.flatten(),
                    reduction="none",
                    ignore_index=-100,
                ).view_as(labels).sum(-1) / (labels != -100).sum(-1).clamp(min=1)
            total = total + self.stage.caption_share * (losses * learns).sum() / size
            self._add(mode, len(TASKS) + 1, losses[learns])
        return total

    # ---- what is logged ----

    def _count(self, mode: str, owner, token_loss, correct) -> None:
        meter = torch.zeros(len(TASKS), 3, dtype=torch.float64)
        values = torch.stack(
            [token_loss.detach().double(), correct.double(), torch.ones_like(token_loss).double()], -1
        )
        self._meters[mode][: len(TASKS)] += meter.index_add(0, owner.cpu(), values.cpu())

    def _add(self, mode: str, place: int, losses: torch.Tensor) -> None:
        self._meters[mode][place] += torch.tensor([losses.detach().sum().item(), 0.0, len(losses)])

    def _read_meters(self, mode: str) -> dict[str, float]:
        meter = self._meters[mode].to(self.args.device)
        meter = self.accelerator.reduce(meter, reduction="sum").cpu()
        self._meters[mode].zero_()
        prefix, figures = "" if mode == "train" else "eval_", {}
        for name, (loss, correct, count) in zip((*TASKS, "ctc", "caption"), meter.tolist(), strict=True):
            if count:
                figures[f"{prefix}loss_{name}"] = round(loss / count, 4)
                if name in TASKS:
                    figures[f"{prefix}token_accuracy_{name}"] = round(correct / count, 4)
        if mode == "eval" and meter[: len(TASKS), 2].sum():
            figures["eval_loss"] = (meter[: len(TASKS), 0].sum() / meter[: len(TASKS), 2].sum()).item()
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = logs | self._read_meters("train")
        super().log(logs, start_time)

    def evaluation_loop(self, *args, **kwargs):
        self._meters["eval"].zero_()
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics.update(self._read_meters("eval"))
        return output

    # ---- evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Loss of the targets; the replies are generated from the prompts alone (the stock trainer's hold the answer)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only or not self.args.predict_with_generate:
                return loss, None, None
            prompt = inputs["prompt_input_ids"]
            bare = self.accelerator.unwrap_model(model)
            audio = bare.adapt_audio(
                inputs["audio_states"], inputs["audio_lengths"], inputs["audio_branches"], inputs.get("audio_pooled")
            )
            sequences = bare.generate(
                input_ids=prompt,
                attention_mask=inputs["prompt_attention_mask"],
                audio_features=audio,
                do_sample=False,
                max_new_tokens=self.args.generation_max_length,
                synced_gpus=is_sharded(bare),
            )
        return loss, sequences[:, prompt.shape[1] :], inputs["labels"]


class _CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint when all of it is written, so that a resumed run never starts from half of one."""

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # each process writes the state of its own random draws
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                (folder / "complete").touch()


class _TrimmedHeap(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % TRIM_EVERY == 0:
            trim_heap()


def checkpoint_activations(model) -> None:
    """Keeps of the LLM's activations only the layers' inputs; transformers renamed the method between 5.17 and 5.23."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def is_sharded(model) -> bool:
    """Whether processes need each other for every pass through the LLM's layers."""
    return any(isinstance(module, FSDPModule) for module in model.get_decoder().layers)


def shard_llm(model) -> None:
    """Each process keeps its share of every decoder layer of the frozen LLM, and the whole layer only while it runs (FSDP 2).
    The adapters stay whole in each (DDP)."""
    if model.config.lora_config is not None:
        raise ValueError("train.shard_llm is for an LLM without LoRA, and this one has it: leave it out.")
    processes = torch.distributed.get_world_size()
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (processes,))
    layers = model.get_decoder().layers
    for layer in layers:
        # Each is a root of its own, whose default keeps it whole from the first forward pass to the end of the backward one.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    kept = sum(parameter.to_local().nbytes for parameter in layers.parameters())
    whole = sum(parameter.nbytes for parameter in layers.parameters())
    if torch.distributed.get_rank() == 0:
        print(f"the LLM's layers: {kept / 2**20:,.2f} of {whole / 2**20:,.2f} MiB in each process", flush=True)
    model.prefix_apart = False  # one batch would need two passes, another process's one, and they wait for each other
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, model.frozen_keys())


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end; others, left by a kill, do not count."""
    found = [path.parent for path in Path(folder).glob("checkpoint-*/complete")]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


def positions_floor(tokens: int, targets: int, config, constant: int = 0) -> float:
    """FLOPs that a frozen LLM must do for one step: forward and the gradient of its input, over real positions alone.

    Two for each weight and position, twice (no weight gradient is needed) but for the `constant` ones before the speech,
    the output layer at the targets only; attention's own products are left out, which makes the floor a little low.
    """
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    attention = width * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layers = config.num_hidden_layers * (attention + 3 * width * inner)
    return (4.0 * tokens - 2.0 * constant) * layers + 4.0 * targets * width * config.vocab_size


def activation_bytes(rows: int, positions: float, config, item: int, eager: bool) -> float:
    """What the backward pass through a frozen LLM keeps: of each position and layer the norms, queries and keys (7 times
    the width), the feed-forward's three products, and with eager attention the weights.

    Args:
        item: bytes of a number.
    """
    kept = rows * positions * config.num_hidden_layers * item * (7 * config.hidden_size + 3 * config.intermediate_size)
    return kept + (weight_bytes(rows, positions, positions, config, item) if eager else 0)


def weight_bytes(rows: int, queries: float, keys: float, config, item: int) -> float:
    """What eager attention keeps for its backward pass: each weight, and once more in float32."""
    return (item + 4) * rows * queries * keys * config.num_hidden_layers * config.num_attention_heads


def eager_fits(rows: int, queries: float, keys: float, config, item: int) -> bool:
    """Whether a batch has eager attention: on a CPU, if its weights are few enough to be kept."""
    return not torch.cuda.is_available() and weight_bytes(rows, queries, keys, config, item) <= EAGER_LIMIT


@contextmanager
def fitted_attention(llm) -> Iterator[None]:
    """Each pass through the LLM has, on a CPU, the kernel that is best for what is left of the batch when the prompt is
    packed: PyTorch's fused attention has a slow backward pass there, a step takes 1.6 times as long (`benchmark train`).
    But the eager one keeps every weight, of a 73 s clip gigabytes: such a batch is better slow. A GPU has one for all."""

    def fit(_, args, kwargs) -> None:
        embeds, mask = kwargs["inputs_embeds"], kwargs["attention_mask"]
        fits = eager_fits(*embeds.shape[:2], mask.shape[-1], llm.config, embeds.element_size())
        attention = "eager" if fits and torch.is_grad_enabled() else "sdpa"
        if llm.config._attn_implementation != attention:
            llm.set_attn_implementation(attention)

    if torch.cuda.is_available():
        yield
        return
    hook = llm.get_decoder().register_forward_pre_hook(fit, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
