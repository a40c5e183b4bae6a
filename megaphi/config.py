"""The whole configuration of a training run: one tree of frozen dataclasses, checked when built.

A recipe is a YAML file with one mapping a section; `--section.key=value` on the command line
overrides it. Values that other values determine (head size, micro-batches a step, data-parallel
size) are derived, never asked for. Defaults are phi-1's ("Textbooks Are All You Need",
arXiv 2306.11644) where the paper gives a value; the docstring of a field says where the value is
ours.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


def require(condition: bool, message: str) -> None:
    """Raise a `ValueError` with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def _require_positive(section: str, values: object, names: Sequence[str]) -> None:
    """Raise a `ValueError` that names the first of `names` whose value is not above zero."""
    for name in names:
        value = getattr(values, name)
        require(value > 0, f"{section}.{name} must be positive, not {value}")


def _require_fraction(section: str, values: object, names: Sequence[str]) -> None:
    """Raise a `ValueError` that names the first of `names` whose value is outside [0, 1)."""
    for name in names:
        value = getattr(values, name)
        require(0.0 <= value < 1.0, f"{section}.{name} must be in [0, 1), not {value}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Shape of the phi model; the defaults are phi-1's 1.3B parameters."""

    num_layers: int = 24
    """Number of parallel attention + MLP blocks."""
    hidden_size: int = 2048
    """Width of the residual stream."""
    num_heads: int = 32
    """Attention heads; hidden_size / num_heads is the head size (64 in phi-1)."""
    intermediate_size: int | None = None
    """Width of the MLP's inner layer; 4 x hidden_size when not given."""
    vocab_size: int = 51200
    """Rows of the embedding and the head; at least the tokenizer's size."""
    max_sequence_length: int = 2048
    """Longest sequence the model is meant for."""
    rotary_fraction: float = 0.5
    """Share of each head that the rotary embedding turns."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every LayerNorm."""
    residual_dropout: float = 0.0
    """Dropout on each branch before it joins the residual stream (phi-1 trained with 0.1)."""
    attention_dropout: float = 0.0
    """Dropout on the attention probabilities (phi-1 trained with 0.1)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; ours, the paper gives none."""

    def __post_init__(self) -> None:
        names = ("num_layers", "hidden_size", "num_heads", "vocab_size", "max_sequence_length")
        _require_positive("model", self, names)
        _require_positive("model", self, ("layer_norm_epsilon", "rotary_base"))
        require(self.ffn_size > 0, f"model.intermediate_size={self.ffn_size} must be positive")
        _require_fraction("model", self, ("residual_dropout", "attention_dropout"))
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size={self.hidden_size} is not a multiple of "
            f"model.num_heads={self.num_heads}",
        )
        require(
            self.hidden_size % 4 == 0,
            f"model.hidden_size={self.hidden_size} must be a multiple of 4 (dropout is drawn for "
            "four elements at a time)",
        )
        require(
            0.0 < self.rotary_fraction <= 1.0 and self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            f"model.rotary_fraction={self.rotary_fraction} turns {self.rotary_dim} of "
            f"{self.head_size} elements of a head; that must be an even number above zero",
        )

    @property
    def head_size(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that the rotary embedding turns."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def ffn_size(self) -> int:
        """Width of the MLP's inner layer."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model is spread over processes; the data-parallel size is what is left."""

    tensor: int = 1
    """Processes that share each layer; rows between the blocks are cut over them too."""
    pipeline: int = 1
    """Processes in a row, each with a part of the blocks."""
    pipeline_schedule: Literal["1f1b", "interleaved", "interleaved-zero-bubble", "zbv"] = "1f1b"
    """Which stage runs which micro-batch when; all but 1f1b have several stages a process."""
    pipeline_stages_per_process: int = 2
    """Stages of a process; 1f1b has one and ignores this."""
    context: int = 1
    """Processes that share each sequence."""
    replicate: int = 1
    """Groups of data-parallel processes that each shard the whole model among themselves, so that
    weights are gathered inside of a group only; 1 shards over all of them."""
    reshard_after_forward: bool = False
    """Free gathered weights after the forward pass (ZeRO-3 traffic) to save memory."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again to save memory: GELU (selective) or whole blocks."""

    def __post_init__(self) -> None:
        _require_positive("parallel", self, ("tensor", "pipeline", "context"))
        _require_positive("parallel", self, ("pipeline_stages_per_process", "replicate"))
        require(
            self.pipeline_schedule != "zbv" or self.pipeline_stages_per_process == 2,
            "parallel.pipeline_schedule=zbv needs parallel.pipeline_stages_per_process=2",
        )

    @property
    def num_stages(self) -> int:
        """Parts into which the pipeline cuts the blocks."""
        several = self.pipeline > 1 and self.pipeline_schedule != "1f1b"
        return self.pipeline * (self.pipeline_stages_per_process if several else 1)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number format of the compute; master weights, moments and reductions are always fp32."""

    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8", "fp8-auto"] = "bf16"
    """fp32, bf16, fp16 (dynamic loss scale), fp8 (bf16 around it), fp8-auto: fp8 where the device
    has it, else bf16, or auto: bf16 where the device computes it natively, else fp32."""
    fp8_backend: Literal["auto", "native", "te"] = "auto"
    """native: torch._scaled_mm and our casts; te: Transformer Engine; auto: native."""
    fp8_scaling: Literal["current", "delayed"] = "current"
    """Scale of a tensor from its own largest value, or from those of the steps before."""
    fp8_layers: list[str] = field(default_factory=lambda: ["qkv", "fc1", "fc2"])
    """Linear layers of a block that run in fp8: some of qkv, out, fc1, fc2."""
    initial_loss_scale: float = 65536.0
    """fp16: factor at the start on the mean loss of a micro-batch."""
    loss_scale_interval: int = 1000
    """fp16: steps without an overflow after which the factor is doubled."""

    def __post_init__(self) -> None:
        known = ("qkv", "out", "fc1", "fc2")
        for layer in self.fp8_layers:
            require(layer in known, f"precision.fp8_layers: {layer} is not one of {known}")
        _require_positive("precision", self, ("initial_loss_scale", "loss_scale_interval"))


AttentionBackend = Literal["flash4", "flash3", "flash2", "te", "cudnn", "flash", "plain"]
"""flash-attn 4, 3 and 2, Transformer Engine, PyTorch's cuDNN and flash, and the plain formula."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the step is computed; the loss does not depend on it, up to rounding."""

    attention: Literal["auto", AttentionBackend] = "auto"
    """Attention kernel: flash-attn 4, 3 or 2, Transformer Engine, PyTorch's cuDNN or flash, the
    plain formula, or auto: the fastest that can do what the recipe needs."""
    compile: bool | Literal["auto"] = "auto"
    """Use torch.compile: on the complete model where one process computes on a CPU, elsewhere on
    each block; auto: in the first case, if the run is long enough to save time."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases and LayerNorms have none."""
    beta1: float = 0.9
    """Decay of the first moment; ours, the paper gives none."""
    beta2: float = 0.95
    """Decay of the second moment; ours, the paper gives none."""
    epsilon: float = 1e-8
    """Added to the root of the second moment; ours, the paper gives none."""
    gradient_clip: float = 1.0
    """Largest global gradient norm, 0 for no clipping; ours, the paper gives none."""

    def __post_init__(self) -> None:
        _require_positive("optimizer", self, ("learning_rate", "epsilon"))
        _require_fraction("optimizer", self, ("beta1", "beta2"))
        for name in ("weight_decay", "gradient_clip"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} must not be negative, not {value}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over steps: linear warm-up, then decay."""

    shape: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up."""
    warmup_steps: int = 750
    """Steps from 0 to the peak."""
    decay_steps: int | None = None
    """Step at which the decay ends; train.steps when not given."""
    minimum_fraction: float = 0.0
    """Learning rate at the end of the decay, as a share of the peak."""

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, "schedule.warmup_steps must not be negative")
        _require_fraction("schedule", self, ("minimum_fraction",))
        if self.decay_steps is not None:
            require(
                self.decay_steps > self.warmup_steps,
                f"schedule.decay_steps={self.decay_steps} must be above "
                f"schedule.warmup_steps={self.warmup_steps}",
            )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which token files are read, and in what order."""

    train: str | list[str | float]
    """Prefix of a token file, or a list: prefixes, or weight, prefix, weight, prefix, …"""
    validation: str | list[str | float] | None = None
    """Token files for evaluation, in the form of `train`; excludes `split`."""
    split: str | None = None
    """Megatron's split by position, "969,30,1": shares of `train` to train, validate and test."""
    sequence_length: int = 2048
    """Tokens of a sample."""
    planned_samples: int | None = None
    """Samples for which the order is drawn; train.steps x train.global_batch_size when not given.
    Megatron's order depends on it, so it must stay the same over a run: set it to lengthen one."""
    prefetch_batches: int = 4
    """Micro-batches that a background thread reads ahead."""
    mask_documents: bool = False
    """Let a token see only its own document, not the ones before it in the sample."""

    def __post_init__(self) -> None:
        _require_positive("data", self, ("sequence_length",))
        require(self.prefetch_batches >= 0, "data.prefetch_batches must not be negative")
        require(
            self.validation is None or self.split is None,
            "data.validation and data.split exclude each other: name a file or a split, not both",
        )
        require(
            self.planned_samples is None or self.planned_samples > 0,
            f"data.planned_samples must be positive, not {self.planned_samples}",
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the run is saved, what is kept, and where it starts."""

    interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept, at least 2."""
    permanent_interval: int | None = None
    """Checkpoints at multiples of this many steps are never deleted."""
    asynchronous: bool | Literal["auto"] = "auto"
    """Train on while a thread writes a snapshot, which takes host memory of the state's size; auto:
    on a GPU."""
    resume: str = "auto"
    """auto: newest verified checkpoint of the run, if any; never: start anew; or a checkpoint."""
    initialize_from: str | None = None
    """Model (run, checkpoint or Hugging Face directory) whose weights a new run starts from."""

    def __post_init__(self) -> None:
        _require_positive("checkpoint", self, ("interval",))
        require(self.keep >= 2, f"checkpoint.keep={self.keep} must be at least 2")
        require(
            self.permanent_interval is None or self.permanent_interval > 0,
            f"checkpoint.permanent_interval must be positive, not {self.permanent_interval}",
        )


@dataclass(frozen=True, kw_only=True)
class Logging:
    """What is reported while training; metrics.jsonl always has every step."""

    interval: int = 10
    """Steps between console lines and TensorBoard points."""
    tensorboard: bool = True
    """Write TensorBoard event files into <run_dir>/tensorboard."""

    def __post_init__(self) -> None:
        _require_positive("logging", self, ("interval",))


@dataclass(frozen=True, kw_only=True)
class Train:
    """The run: where it lives, how long it is, how large its batches are."""

    run_dir: str
    """Directory of checkpoints, metrics and logs."""
    steps: int
    """Optimizer steps in all."""
    seed: int = 1234
    """Seed of the initial weights, the data order and dropout."""
    micro_batch_size: int = 8
    """Sequences of one forward and backward pass on one process."""
    global_batch_size: int = 1024
    """Sequences of one optimizer step over all processes."""
    evaluation_interval: int = 500
    """Steps between evaluations, where there is validation data."""
    evaluation_batches: int = 8
    """Global batches of one evaluation."""
    max_nonfinite_steps: int = 5
    """Steps in a row with a non-finite gradient that stop the run; each such step is skipped."""
    spike_deviations: float = 0.0
    """Standard deviations above the mean of the last losses from which on a loss is spiked; a spike
    is answered by a rewind that leaves out its data. 0: losses are not watched. Try 8."""
    spike_window: int = 100
    """Ordinary steps whose losses are the measure."""
    spike_steps: int = 3
    """Spiked steps in a row that make a spike."""
    spike_rewind_steps: int = 50
    """Steps before a spike that are run again as well, with other data."""
    max_rewinds: int = 3
    """Rewinds of a run; the next spike stops it."""
    hang_seconds: float = 480.0
    """Seconds without any progress after which a process says where it stands and ends, three times
    as many while loading and in the first step; 0: never. More than a save or an evaluation of one
    batch takes, less than the 600 after which collectives give up without naming anyone."""
    replica_check_interval: int = 500
    """Steps between comparisons of the values that several processes must hold alike; 0: never."""

    def __post_init__(self) -> None:
        names = ("steps", "micro_batch_size", "global_batch_size", "evaluation_interval")
        _require_positive("train", self, names)
        _require_positive("train", self, ("evaluation_batches", "max_nonfinite_steps"))
        _require_positive("train", self, ("spike_window", "spike_steps"))
        for name in (
            "spike_deviations",
            "spike_rewind_steps",
            "max_rewinds",
            "hang_seconds",
            "replica_check_interval",
        ):
            value = getattr(self, name)
            require(value >= 0, f"train.{name} must not be negative, not {value}")
        require(self.seed >= 0, f"train.seed must not be negative, not {self.seed}")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size={self.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={self.micro_batch_size}",
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a run."""

    train: Train
    data: Data
    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    compute: Compute = field(default_factory=Compute)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)

    def __post_init__(self) -> None:
        require(
            self.data.sequence_length <= self.model.max_sequence_length,
            f"data.sequence_length={self.data.sequence_length} is longer than the model allows "
            f"(model.max_sequence_length={self.model.max_sequence_length})",
        )
        _check_layout(self)
        kept = (self.checkpoint.keep - 1) * self.checkpoint.interval
        back = self.train.spike_rewind_steps + self.train.spike_steps
        require(
            self.train.spike_deviations == 0 or kept >= back,
            f"a rewind goes back {back} steps (train.spike_rewind_steps + train.spike_steps), but "
            f"the oldest checkpoint may be only {kept} steps old; raise checkpoint.keep",
        )

    @property
    def planned_samples(self) -> int:
        """Samples for which Megatron's order is drawn."""
        return self.data.planned_samples or self.train.steps * self.train.global_batch_size

    def micro_batches(self, data_parallel_size: int) -> int:
        """Micro-batches of a step on each of `data_parallel_size` processes.

        Raises:
            ValueError: the global batch does not divide.
        """
        per_pass = self.train.micro_batch_size * data_parallel_size
        require(
            self.train.global_batch_size % per_pass == 0,
            f"train.global_batch_size={self.train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={self.train.micro_batch_size} x {data_parallel_size} "
            "data-parallel processes",
        )
        count = self.train.global_batch_size // per_pass
        stages = self.parallel.pipeline
        schedule = self.parallel.pipeline_schedule
        fits = count >= stages if schedule in ("1f1b", "zbv") else count % stages == 0
        require(
            stages == 1 or fits,
            f"{count} micro-batch(es) a step on each process are too few or do not divide for "
            f"parallel.pipeline={stages} with parallel.pipeline_schedule={schedule}; the nearest "
            f"train.global_batch_size is {per_pass * stages * max(1, round(count / stages))}",
        )
        return count

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, in the form of a recipe file."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The recipe as a recipe file that reruns the run."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _check_layout(recipe: Recipe) -> None:
    """Raise a `ValueError` where model, batch and layout do not divide.

    The message names the numbers and the nearest layout that divides.
    """
    model, parallel, data = recipe.model, recipe.parallel, recipe.data

    def divides(key: str, size: int, what: str, total: int) -> None:
        if total % size:
            nearest = min(
                (n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - size)
            )
            raise ValueError(
                f"parallel.{key}={size} does not divide {what} = {total}; the nearest that does is "
                f"{nearest}"
            )

    divides("tensor", parallel.tensor, "model.num_heads", model.num_heads)
    divides("tensor", parallel.tensor, "model.vocab_size", model.vocab_size)
    divides("tensor", parallel.tensor, "the MLP's width", model.ffn_size)
    require(
        data.sequence_length % (2 * parallel.context) == 0 or parallel.context == 1,
        f"data.sequence_length={data.sequence_length} does not divide into 2 x "
        f"parallel.context={parallel.context} chunks",
    )
    rows = recipe.train.micro_batch_size * data.sequence_length // parallel.context
    divides("tensor", parallel.tensor, "the tokens of a micro-batch on a process", rows)
    for axis in ("context", "pipeline"):
        require(
            not (data.mask_documents and getattr(parallel, axis) > 1),
            f"data.mask_documents does not work with parallel.{axis} above 1; use one of them",
        )
    require(
        parallel.num_stages <= model.num_layers,
        f"{parallel.num_stages} pipeline stages are more than the blocks there are: use at most "
        f"model.num_layers={model.num_layers}",
    )
