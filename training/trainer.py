"""Training through the frozen LLM: one stage of the paper (section III-C) is one run of `DualSLMTrainer`."""

from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor
from ..turns_dual_slm import SOURCES
from .collator import TrainingCollator
from .dataset import BucketSampler, StageDataset
from .forward import accept_targets, adapt_cached
from .hardware import TRIM_EVERY, fitted_attention, is_sharded, trim_heap
from .labels import KINDS, TASKS
from .recipe import StageRecipe
from .spelling import label_losses, label_rows

Mode = Literal["train", "eval"]
_NOT_OF_THE_MODEL = ("prompt_", "teacher_", "caption_", "task_ids")


_BRANCHES = tuple(SOURCES)  # in the order of `audio_branches` and `audio_trained`


class DualSLMTrainer(Seq2SeqTrainer):
    """Trains the adapters through the frozen LLM, each branch at its learning rate.

    The loss may have a share of stage 0's loss on captions, and KL to the frozen LLM. Losses and token accuracies are
    logged for each task. Validation generates from the prompt alone. Complete checkpoints are marked.

    Args:
        evaluation_collator: adds prompts to generate from.
        kwargs: of `Seq2SeqTrainer`; `eval_dataset` is a list of [`Item`], `data_collator` a [`TrainingCollator`].

    Raises:
        ValueError: nothing learns, a task teaches nothing, or `caption_share` has nothing to keep.
    """

    model: DualSLMForConditionalGeneration
    args: Seq2SeqTrainingArguments
    processing_class: DualSLMProcessor
    train_dataset: StageDataset

    def __init__(self, *args, stage: StageRecipe, evaluation_collator: TrainingCollator | None = None, **kwargs):
        self.stage, self.evaluation_collator = stage, evaluation_collator
        super().__init__(*args, **kwargs)
        accept_targets(self.model)
        # Sums of losses, of right tokens and of tokens: a row for each task, and one for captions (samples).
        self._meters = {mode: torch.zeros(len(TASKS) + 1, 3, dtype=torch.float64) for mode in ("train", "eval")}
        if stage.caption_share and self.processing_class.caption_slots is None:
            if not self.processing_class.attribute_labels:
                raise ValueError(
                    f"stage {stage.name}: caption_share is {stage.caption_share}, and stage 0 taught these adapters "
                    "neither a caption nor labels: set it to 0."
                )
            self._anchors = list(label_rows(self.model, self.processing_class).values())
        self._learns = torch.zeros(2, dtype=torch.bool)  # whether each adapter has learnt from a clip in this step
        self.add_callback(_Steps(self))
        self._freeze()

    def _freeze(self) -> None:
        """Freezes what has no learning rate in this stage, and refuses tasks that then teach nothing."""
        stage, taught = self.stage, set()  # kinds of tasks that something learns from
        for name, parameter in self.model.named_parameters():
            if "_adapter." in name or ".lora_" in name:
                parameter.requires_grad_(self._rate(name) > 0)
                if parameter.requires_grad:  # LoRA learns from every task, an adapter from its own and from dialogues
                    taught |= set(KINDS.values()) if ".lora_" in name else {name.split("_adapter")[0], "dual"}
        if not taught:
            raise ValueError(
                f"stage {stage.name}: nothing learns, as the rates of all that there is are 0. Give a learning_rate, or "
                "for residual_learning_rate add the residual (model.config.paralinguistic_soft_residual)."
            )
        idle = [task for task in stage.task_names if KINDS[task] not in taught]
        if idle and stage.err and stage.err_stage != "joint":
            raise ValueError(
                f"stage {stage.name}: {', '.join(idle)} would teach nothing, as ERR lets a task train its own adapter alone "
                "and that one is frozen: leave it out, or give the adapter a rate."
            )

    def get_train_dataloader(self) -> DataLoader:
        batch_size = self.args.per_device_train_batch_size * self.args.world_size
        sampler = BucketSampler(self.train_dataset, batch_size, self.args.data_seed or self.args.seed)
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator, num_workers=workers
        )
        loader = self.accelerator.prepare(loader)
        # A run resumed in a later epoch sets the loader's epoch, which the loader passes to its own sampler alone.
        if loader.batch_sampler is not sampler:
            loader.batch_sampler.set_epoch = sampler.set_epoch
        return loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        collator, self.data_collator = self.data_collator, self.evaluation_collator or self.data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _rate(self, name: str) -> float:
        """The learning rate of a parameter. 0 freezes it for the stage, and a frozen adapter has no dropout."""
        branch = "lora" if ".lora_" in name else name.split("_adapter")[0]
        if branch == "linguistic" and self.processing_class.linguistic_adapter_type == "letters":
            return 0.0  # its words are chosen by a search, which has no gradient
        rates = [getattr(self.stage, f"{branch}_learning_rate", None), self.args.learning_rate]
        if ".residual." in name:
            rates.insert(0, self.stage.residual_learning_rate)
        return next(rate for rate in rates if rate is not None)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW with a rate for each branch, and no decay of norms, biases and vectors."""
        if self.optimizer is None:
            groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((self._rate(name), parameter.ndim > 1), []).append(parameter)
            args, betas = self.args, (self.args.adam_beta1, self.args.adam_beta2)
            params = [
                {"params": parameters, "lr": rate, "weight_decay": args.weight_decay if decays else 0.0}
                for (rate, decays), parameters in groups.items()
            ]
            self.optimizer = torch.optim.AdamW(params, args.learning_rate, betas, args.adam_epsilon)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        """Mean loss of a target token over the whole batch of all processes, plus the share of stage 0's loss."""
        bare = self.accelerator.unwrap_model(model)
        model_inputs = {key: value for key, value in inputs.items() if not key.startswith(_NOT_OF_THE_MODEL)}
        with fitted_attention(bare.language_model):
            output = model(**model_inputs, only_targets=True)
        known = output.labels != -100
        logits, labels = output.logits.float(), output.labels[known]
        log_probs = logits.log_softmax(-1)
        token_loss = -log_probs.gather(-1, labels[:, None])[:, 0]
        tasks = inputs["task_ids"][:, None].expand_as(output.labels)[known]
        mode: Mode = "train" if model.training else "eval"
        correct = (logits.argmax(-1) == labels).double()
        counted = torch.stack([token_loss.detach().double(), correct, torch.ones_like(correct)], -1).cpu()
        self._meters[mode] += torch.zeros_like(self._meters[mode]).index_add(0, tasks.cpu(), counted)
        if "teacher_ids" in inputs and self.stage.objective != "ce":
            token_loss = self._with_teacher(token_loss, log_probs, inputs["teacher_ids"], inputs["teacher_log_probs"])
        loss = token_loss.mean() if num_items_in_batch is None else token_loss.sum() / num_items_in_batch
        if mode == "train" and num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        kept = self._caption_loss(output.audio_features, inputs, mode)
        loss = loss + kept / (self.current_gradient_accumulation_steps if mode == "train" else 1)
        if mode == "train":
            heard = inputs["audio_trained"].bool() & inputs["audio_branches"].bool()
            self._learns |= heard.any(0).cpu()
            # If a batch has one kind of task alone, the other adapter's gradient is zero, not missing.
            loss = loss + 0.0 * sum(p.sum() for p in self.model.parameters() if p.requires_grad)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1} of stage {self.stage.name}: lower the "
                    "learning rate. The checkpoints so far are kept."
                )
        return (loss, output) if return_outputs else loss

    def _with_teacher(self, token_loss, log_probs, ids, teacher) -> torch.Tensor:
        """KL(frozen LLM || model) over the teacher's k likeliest tokens; `teacher` (targets, k) is -inf without one."""
        has = torch.isfinite(teacher[:, 0])
        weights = teacher.masked_fill(~has[:, None], 0.0).softmax(-1)
        divergence = (weights * (weights.clamp(min=1e-9).log() - log_probs.gather(-1, ids))).sum(-1)
        if self.stage.objective == "kl":
            return torch.where(has, divergence, token_loss)
        return token_loss + torch.where(has, divergence, 0.0)

    def _caption_loss(self, audio, inputs: dict[str, torch.Tensor], mode: Mode) -> torch.Tensor:
        """The weighted loss of captions (emosllm: of labels), per sample of the batch."""
        tasks = inputs["task_ids"]
        if "caption_labels" not in inputs or audio.paralinguistic_embeds is None:
            return torch.zeros((), device=tasks.device)
        heard = inputs["audio_branches"][:, 0].bool()
        labels, learns = inputs["caption_labels"][heard], inputs["audio_trained"][heard, 0].bool()
        if audio.paralinguistic_logits is None:
            losses = label_losses(audio.paralinguistic_embeds, labels, self._anchors)
        else:
            logits = audio.paralinguistic_logits.float().flatten(0, 1)
            losses = nn.functional.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)
            losses = losses.sum(-1) / (labels != -100).sum(-1).clamp(min=1)
        taught = losses[learns]
        self._meters[mode][len(TASKS)] += torch.tensor([taught.detach().sum().item(), 0.0, len(taught)])
        return self.stage.caption_share * (losses * learns).sum() / len(tasks)

    def _read_meters(self, mode: Mode) -> dict[str, float]:
        """The figures of all processes since the last call."""
        meter = self._meters[mode].to(self.args.device)
        meter = torch.as_tensor(self.accelerator.reduce(meter, reduction="sum")).cpu()
        self._meters[mode].zero_()
        prefix, figures = "" if mode == "train" else "eval_", {}
        for name, (loss, correct, count) in zip((*TASKS, "caption"), meter.tolist(), strict=True):
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
        return output._replace(metrics=(output.metrics or {}) | self._read_meters("eval"))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs) -> tuple[Any, ...]:
        """Loss of the targets, and replies to the prompts alone: the stock trainer's prompts hold the answer."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only or not self.args.predict_with_generate:
                return loss, None, None
            prompt, bare = inputs["prompt_input_ids"], self.accelerator.unwrap_model(model)
            states, lengths, branches = (inputs[f"audio_{name}"] for name in ("states", "lengths", "branches"))
            sequences = bare.generate(
                input_ids=prompt,
                attention_mask=inputs["prompt_attention_mask"],
                audio_features=adapt_cached(bare, states, lengths, branches, inputs.get("audio_pooled")),
                do_sample=False,
                max_new_tokens=self.args.generation_max_length,
                synced_gpus=is_sharded(bare),
            )
        return loss, sequences[:, prompt.shape[1] :], inputs["labels"]

    def hold_frozen_adapters(self) -> None:
        """Keeps the optimizer from an adapter that no clip of the step teaches, in any process (ERR, section III-C).

        Its gradient is zero then, but momentum and weight decay would move it all the same.
        """
        learns: Any = self.accelerator.reduce(self._learns.to(self.args.device, torch.float32))
        self._learns.zero_()
        for name, parameter in self.model.named_parameters():
            branch = name.split("_adapter.")[0]
            if branch in _BRANCHES and not learns[_BRANCHES.index(branch)]:
                parameter.grad = None


class _Steps(TrainerCallback):
    """Freezes what a step does not teach, returns freed memory, and marks checkpoints that are written to their end."""

    def __init__(self, trainer: DualSLMTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.hold_frozen_adapters()

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # each process writes the state of its own random draws
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / "complete").touch()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % TRIM_EVERY == 0:
            trim_heap()


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end. Others are left over from a kill."""
    found = [path.parent for path in Path(folder).glob("checkpoint-*/complete")]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None
