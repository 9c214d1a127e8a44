"""The configuration of a run: what Hydra composes, what validation checks, what every part reads.

Only plain types live here, so that the file can be read without Hydra. `conf/` holds the values; the defaults
of attention and stage, which the Python API uses, are those of conf/attention/infini.yaml and
conf/stage/default.yaml.
"""

from dataclasses import dataclass, field, replace
from typing import Any

OFFLINE_TASKS = (
    "offline_piqa",
    "offline_openbookqa",
    "offline_commonsenseqa",
    "offline_siqa",
    "offline_boolq",
    "offline_mmlu",
    "offline_cloze",
)
"""The task files of `eval/tasks/`, whose items need no hub."""


@dataclass
class ModelConfig:
    """The teacher: `kind` is smollm2 (from the package index), hf (hub id), local (folder) or tiny (random,
    for tests).
    """

    kind: str = "smollm2"
    id: str | None = None
    path: str | None = None
    revision: str | None = None
    family: str = "llama"
    trust_remote_code: bool = False


@dataclass
class AttentionConfig:
    """One attention variant and its options; see `replace/attention/` for the equations.

    `window` counts the exact tokens before a query's own block and is a multiple of `block`; `local: segment`
    has none, and `local: none` (of `linear`) has not even the own block. `scale` multiplies q and k before a
    feature map; None stands for the root of the teacher's softmax scale. `own` holds options that only this
    variant has, by name (`attention.own.<name>=...`).

    `pairs_recent` is the share of the `pairs` places in which pairs age: in 1,024 tokens one there loses
    `pairs_fade` of its score. The other places are for what scores best at any age.
    """

    name: str = "infini"
    local: str = "sliding_window"
    block: int = 32
    window: int = 32
    sinks: int = 4
    distance_cap: int | None = 512
    pairs: int = 64
    pairs_score: str = "learned"
    pairs_recent: float = 0.0
    pairs_fade: float = 3.0
    feature_map: str = "hedgehog"
    update: str = "linear"
    gate: str = "head"
    gate_init: float = -2.0
    write_gate: str = "token"
    scale: float | None = None
    rotary: bool = False
    clamp: float = 1e4
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def recent_places(self) -> int:
        """How many of the `pairs` places are for recent pairs."""
        return round(self.pairs * self.pairs_recent)

    def shared_with(self, name: str) -> "AttentionConfig":
        """These options for the variant `name`: `own` stays behind, unless it is the same variant."""
        return replace(self, name=name, own=dict(self.own) if name == self.name else {})


@dataclass
class LayersConfig:
    """Which decoder layers get `attention`: `select` is all, list, every, first, last, auto or retrieval.

    `indices` serves `list`; `k` serves every (each k-th), first, last, retrieval (the k layers in which the
    teacher's attention goes from the answer to the needle most strongly) and auto (the k layers that cost
    least; see `distill/selection.py`). `rest` is what the others get: keep, or a variant's name, which then
    shares all options of `attention`.

    What auto ranks by is the KL to the teacher in nats a token, and `recall_weight` times the share of the
    needles' tokens that are lost; `search` is independent (each layer alone) or greedy (one after the other).
    `compare` measures whole sets of k layers: the chosen one beside uniform and random ones. `ranking` names
    a run or file whose ranking is taken instead of measuring.
    """

    select: str = "all"
    indices: list[int] = field(default_factory=list)
    k: int = 1
    rest: str = "keep"
    search: str = "independent"
    recall_weight: float = 1.0
    compare: bool = False
    ranking: str | None = None


@dataclass
class DataConfig:
    """The text: `kind` is index (from the package index), files or hf.

    `recall` is the share of recall episodes among the rows of stages 2 and 3, `recall_transfer` that of stage
    1, where they teach the scores of retained pairs what a later question will look for.
    """

    kind: str = "index"
    path: str | None = None
    name: str | None = None
    split: str = "train"
    text_field: str = "text"
    recall: float = 0.34
    recall_transfer: float = 0.8


@dataclass
class StageBudget:
    """The size of one stage: tokens in all, rows a step, tokens a row. `tokens: 0` leaves the stage out."""

    tokens: int = 0
    batch: int = 1
    length: int = 1024


@dataclass
class ChoiceBudget:
    """What a choice of layers costs: the transfer before it, and what each measurement reads of the dev text.

    `tokens` (0: none) are those of the transfer, in steps of `batch` rows; rows and episodes are those of a
    measurement, all of `length` tokens.
    """

    tokens: int = 8192
    batch: int = 1
    length: int = 512
    rows: int = 4
    episodes: int = 4


@dataclass
class EvalBudget:
    """How much is measured: perplexity tokens a book, the recall lengths between phases and at the end.

    `episodes` counts those of one length and depth, spread over kinds of needle and haystacks; a mean over
    the three depths in the report has 3 * episodes / 4 (see `eval/plan.py`).
    """

    perplexity_tokens: int = 16384
    perplexity_length: int = 1024
    episodes: int = 8
    phase_lengths: list[int] = field(default_factory=lambda: [1024])
    final_lengths: list[int] = field(default_factory=lambda: [1024, 4096])
    speed_lengths: list[int] = field(default_factory=lambda: [1024, 65536])


@dataclass
class BudgetConfig:
    """Everything that costs time; `continued_teacher` is for the unswapped model on the same tokens."""

    name: str = "quick"
    continued_teacher: bool = False
    choice: ChoiceBudget = field(default_factory=ChoiceBudget)
    stage1: StageBudget = field(default_factory=StageBudget)
    stage2: StageBudget = field(default_factory=StageBudget)
    stage3: StageBudget = field(default_factory=StageBudget)
    lora: StageBudget = field(default_factory=StageBudget)
    eval: EvalBudget = field(default_factory=EvalBudget)


@dataclass
class StageConfig:
    """How the three stages train: learning rates by parameter group, losses, guards.

    Every `validate_every` steps (0: never) a stage's own loss is measured on `validate_rows` rows of the dev
    text; the best step's weights are kept and taken at the end if they are better than the last. After
    `patience` measurements without a better one (0: never) the stage ends early. See `distill/dev.py`.
    """

    transfer_loss: str = "mse"
    objective: str = "kl"
    lr_projection1: float = 0.0
    lr_map1: float = 3e-3
    lr_gate: float = 1e-2
    lr_score: float = 3e-2
    lr_projection2: float = 2e-4
    lr_map2: float = 3e-3
    lr_stage3: float = 1e-5
    warmup: float = 0.05
    clip: float = 1.0
    accumulate: int = 1
    max_skipped: int = 5
    weight_decay: float = 0.0
    checkpoint_every: int = 20
    validate_every: int = 0
    validate_rows: int = 8
    patience: int = 0
    gradient_checkpointing: bool = False


@dataclass
class LoraConfig:
    """The tuning after stage 3: `kind` is none, peft, unsloth or auto (`distill/lora/choice.py` says which).

    `targets` are names of linear modules, as PEFT takes them, or all-linear: those of all decoder layers but
    the new attention's own. `qlora` holds the frozen weights in 4 bit while it trains. `data` is chat or text
    (the run's own); `path` a .jsonl of chats, by default questions and answers out of the package index;
    `template` a name of `distill/lora/templates.py`, by default the tokenizer's own.
    """

    kind: str = "none"
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    bias: str = "none"
    rslora: bool = False
    dora: bool = False
    qlora: bool = False
    lr: float = 2e-4
    data: str = "chat"
    path: str | None = None
    template: str | None = None


@dataclass
class EvalConfig:
    """What is measured: a named set, and how it is made up.

    `base` is what every phase gets: quick (perplexity, probes, recall), one of these alone, several joined by
    +, or none; `more` names measurements for the teacher and the last phase (`eval/measurements/`). `control`
    is the folder of a run of equal budget with the same window and no memory, whose figures stand beside
    (`eval/control.py`).
    The rest is how large those are: `stream_tokens` at most of a book for `streaming`; the grid of `niah`
    (depths in % from the start, forms as in `replace/needles.py`, episodes a cell) and of `passkey`; lengths
    of context for `speed`.

    `tasks` and `limit` serve lm_eval: task files of `eval/tasks/` by name, a task file of one's own by path,
    or tasks of lm-eval by name; and how many items of each are taken, null for all.
    """

    name: str = "quick"
    base: str = "quick"
    more: list[str] = field(default_factory=list)
    control: str | None = None
    stream_tokens: int = 200_000
    niah_lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    niah_depths: list[float] = field(default_factory=lambda: [0, 25, 50, 75, 100])
    niah_forms: list[str] = field(default_factory=lambda: ["sentence", "key_value", "single_3", "multikey_1"])
    niah_episodes: int = 1
    passkey_lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16384])
    passkey_episodes: int = 1
    speed_lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16384])
    tasks: list[str] = field(default_factory=lambda: list(OFFLINE_TASKS))
    limit: int | None = 100


@dataclass
class KernelsConfig:
    """Which form of the operators in `kernels` runs: auto (the fastest that can), triton, chunk or reference.

    It holds for the operators that have these forms and take part in a run; see `kernels/dispatch.py`. The
    default is chunk as long as no GPU has run the Triton forms (`pytest -m gpu`).
    """

    backend: str = "chunk"


@dataclass
class LoggerConfig:
    """Where metrics go besides the run's folder: none or wandb; `artifact`: the exported model as well."""

    kind: str = "none"
    project: str = "layer-replace"
    artifact: bool = True


@dataclass
class DevicesConfig:
    """What `dry_run=true` plans for; a run takes what its launcher gives it.

    `processes`, 0 for those of the launch; `sharding`: none (each holds the model) or fsdp2; `memory`: GiB of
    each device, 0 for what is here.
    """

    processes: int = 0
    sharding: str = "none"
    memory: float = 0.0


@dataclass
class Config:
    """One run; `export_dtype` (fp32, bf16, fp16) is that of the exported weights, the mixers' own excepted.

    `softmax_backend` computes what is left of softmax attention: auto (the first that can of torch's flash,
    efficient and math), one of these where it can, or xformers; see `replace/softmax_backend.py`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    experiment: str | None = None
    seed: int = 0
    stages: list[int] = field(default_factory=lambda: [1, 2, 3])
    source: str | None = None
    resume: str | None = None
    dry_run: bool = False
    verbose: bool = False
    precision: str = "auto"
    export_dtype: str = "fp32"
    softmax_backend: str = "auto"
    threads: int | None = None

    @property
    def running(self) -> dict[int, StageBudget]:
        """Stage -> its budget, in their order, of the stages that have tokens to train on."""
        budgets = {number: getattr(self.budget, f"stage{number}") for number in sorted(self.stages)}
        return {number: budget for number, budget in budgets.items() if budget.tokens}

    @property
    def tunes(self) -> bool:
        """Whether adapters are trained after the stages."""
        return self.lora.kind != "none" and self.budget.lora.tokens > 0
