"""The stages as data: which parameters, which learning rates, and what one step computes.

Stage 1 (transfer) is local: while the teacher's own attention runs, each replaced layer is given the
teacher's input and learns the teacher's output, and its backward ends before the next layer begins. There is
no graph through the model, no second model, and nothing above the last replaced layer is computed. Beside it,
where pairs are retained, their scores learn the teacher's later attention. With
`stage.transfer_loss=attention_weights` the feature maps alone learn instead, and not the teacher's output but
its attention weights. Stages 2 and 3 train in place, on the language model's objective.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.data import Batch
from distill.objective import language_loss, score_loss, transfer_loss, weights_loss
from distill.sharding import in_shards
from replace.config import Config
from replace.convert import at_rest, conversion_of, replaced_layers, teacher_attention
from replace.errors import UserError
from replace.layer import AttentionModule
from replace.memory import MemoryMixer
from replace.observe import Attending, later_attention, observe
from replace.rotary import family_rotation, unrotate

logger = logging.getLogger(__name__)

LORA = 4
"""The number of the tuning with adapters, which comes after the three stages."""
NAMES = {1: "transfer", 2: "new layers", 3: "full model", LORA: "adapters"}
KINDS = ("projection", "map", "gate", "score")

StepResult = dict[str, float]
"""Named losses of one step; `loss` is the one that is minimised."""


@dataclass
class Stage:
    """One stage, ready to be trained.

    Attributes:
        groups: optimizer groups, `{"params", "lr", "weight_decay", "name"}`.
        step: adds the gradients of a batch, scaled by its second argument, and returns the losses; without a
            gradient where that is None. A batch is what its rows are made of: `Batch`, or `Packed` for the
            adapters, which are never asked for losses alone.
        names: the trainable parameters' names, what a checkpoint must hold.
        idle: why there is nothing to learn; None where there is.
    """

    number: int
    groups: list[dict]
    step: Callable[[Any, float | None], StepResult]
    names: list[str]
    idle: str | None = None

    @property
    def phase(self) -> str:
        """The name of its phase, and of its checkpoints' folder."""
        return phase_of(self.number)

    @property
    def title(self) -> str:
        """What a sentence calls it."""
        return "lora" if self.number == LORA else f"stage {self.number}"


def phase_of(number: int) -> str:
    """The phase of a stage: stage1 to stage3, lora."""
    return "lora" if number == LORA else f"stage{number}"


class Stop(Exception):
    """Ends a teacher forward once the last replaced layer has been seen."""


def kind_of(name: str) -> str:
    """The group of a parameter of a replaced layer, by its name below the attention module."""
    if not name.startswith("mixer."):
        return "projection"
    rest = name.removeprefix("mixer.")
    if rest.startswith("score."):
        return "score"
    return "gate" if rest.startswith(("gate.", "log_amplitude")) else "map"


def local_groups(model: nn.Module, rates: dict[str, float], decay: float) -> tuple[list[dict], list[str]]:
    """Optimizer groups over the replaced layers' parameters; a kind with rate 0 stays frozen.

    Read gates, amplitudes and scores get no weight decay here: it would pull them towards their neutral value
    whatever the data say. Stage 3 has a single group, which decays all by `stage.weight_decay`, 0 by default.
    """
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    names = []
    wanted = {id(p): kind_of(n) for m in replaced_layers(model).values() for n, p in m.named_parameters()}
    for name, parameter in model.named_parameters():
        kind = wanted.get(id(parameter))
        trainable = kind is not None and rates[kind] > 0
        parameter.requires_grad_(trainable)
        if trainable and kind is not None:
            kinds[kind].append(parameter)
            names.append(name)
    groups = [
        {
            "params": p,
            "lr": rates[kind],
            "name": kind,
            "weight_decay": decay if kind in ("projection", "map") else 0.0,
        }
        for kind, p in kinds.items()
        if p
    ]
    if not wanted:
        raise UserError("nothing is trainable: no layer is replaced.")
    return groups, names


def why_idle(model: nn.Module, number: int, fields: dict[str, str], rates: dict[str, float]) -> str | None:
    """Why a stage over the replaced layers has nothing to learn; None where it has.

    Args:
        fields: the fields of `stage.*` that hold the rates, by kind of parameter.
    """
    present = {kind_of(n) for m in replaced_layers(model).values() for n, _ in m.named_parameters()}
    able = [kind for kind in fields if kind in present]
    if any(rates[kind] for kind in able):
        return None
    settings = ", ".join(f"stage.{fields[kind]}=0" for kind in able)
    return (
        f"stage {number} ({NAMES[number]}) has nothing to learn: {settings} "
        f"{'freezes' if len(able) == 1 else 'freeze'} all that its layers have to train "
        f"({', '.join(f'{kind}s' for kind in able)}), and a rate above 0 would train it"
    )


def transfer_stage(model: PreTrainedModel, config: Config) -> Stage:
    """Stage 1."""
    stage = config.stage
    if stage.transfer_loss == "cosine":
        logger.warning("stage.transfer_loss=cosine looks at directions only: the outputs' magnitude is lost")
    by_weights = stage.transfer_loss == "attention_weights"
    rates = {
        "projection": 0.0 if by_weights else stage.lr_projection1,
        "map": stage.lr_map1,
        "gate": 0.0 if by_weights else stage.lr_gate,
        "score": stage.lr_score,
    }
    groups, names = local_groups(model, rates, stage.weight_decay)
    fields = {"projection": "lr_projection1", "map": "lr_map1", "gate": "lr_gate", "score": "lr_score"}
    idle = why_idle(model, 1, fields, rates)
    layers = replaced_layers(model)
    originals = conversion_of(model).originals
    last = max(layers)
    decoder = model.get_decoder()
    whole_pass = in_shards(model)  # what a layer has gathered it gives back at the end of its own forward
    # A layer with nothing new but a score (its projections frozen) has no use for a backward.
    learning = {
        index
        for index, layer in layers.items()
        if any(p.requires_grad for n, p in layer.named_parameters() if kind_of(n) != "score")
    }
    if by_weights:
        learning = {index for index in learning if learns_map(layers[index])}
        if not learning:
            raise UserError(
                "stage.transfer_loss='attention_weights' is not possible, since no replaced layer has a "
                "feature map that learns; allowed: mse, huber, cosine."
            )
    scored = sum(bool(getattr(layer.mixer, "learns_score", False)) for layer in layers.values())

    def step(batch: Batch, scale: float | None) -> StepResult:
        raw: dict[int, float] = {}
        losses: dict[str, float] = {"loss": 0.0, "transfer": 0.0, "score": 0.0}
        later: dict[int, Tensor] = {}
        seen: dict[int, Attending] = {}

        def look(module: AttentionModule, attending: Attending) -> None:
            mixer = layers[module.layer_idx].mixer
            if by_weights and module.layer_idx in learning:
                seen[module.layer_idx] = attending
            if getattr(mixer, "learns_score", False):
                gap = (mixer.lookback + 1) * mixer.block
                later[module.layer_idx] = later_attention(attending, gap)

        def learn(module: AttentionModule, args: tuple, kwargs: dict, output) -> None:
            index = module.layer_idx
            layer, target = layers[index], output[0].detach()
            hidden = args[0] if args else kwargs["hidden_states"]  # families differ
            given = {k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            with torch.set_grad_enabled(scale is not None):
                total = torch.zeros((), device=target.device)
                if index in seen:
                    tables = kwargs.get("position_embeddings")
                    with torch.autocast(target.device.type, enabled=False):
                        total = map_loss(module, layer.mixer, seen.pop(index), tables)
                    raw[index] = float(total.detach())
                    losses["transfer"] += raw[index] / len(learning)
                elif index in learning:
                    answer = layer(*args, **given)[0]
                    total, unscaled = transfer_loss(stage.transfer_loss, answer, target, batch.padding)
                    losses["transfer"] += float(total.detach()) / len(learning)
                    raw[index] = float(unscaled)
                if index in later:
                    mixer = layer.mixer
                    with torch.autocast(target.device.type, enabled=False):
                        score = mixer.score(hidden, None, None)
                    taught = score_loss(score, later.pop(index), mixer.options.pairs, mixer.options.sinks)
                    losses["score"] += float(taught.detach()) / scored
                    total = total + taught
                if scale is not None and total.requires_grad:
                    (total * scale / len(layers)).backward()
            if index == last and not whole_pass:
                raise Stop

        hooks = [originals[i].register_forward_hook(learn, with_kwargs=True) for i in layers]
        try:
            looking = observe([originals[i] for i in layers], look)
            with torch.no_grad(), teacher_attention(model), at_rest(model), looking:
                decoder(input_ids=batch.input_ids, attention_mask=batch.padding, use_cache=False)
        except Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        losses["loss"] = losses["transfer"] + losses["score"]
        return losses | {f"layer_{i}": value for i, value in raw.items()}

    return Stage(1, groups, step, names, idle)


def learns_map(layer: AttentionModule) -> bool:
    """Whether a replaced layer has feature maps that the teacher's attention weights can teach."""
    mixer = layer.mixer
    return isinstance(mixer, MemoryMixer) and mixer.learns_map(mixer.options)


def map_loss(
    module: AttentionModule,
    mixer: MemoryMixer,
    attending: Attending,
    tables: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`weights_loss` of a layer's feature maps on the teacher's own queries and keys.

    Args:
        module: the teacher's attention.
        attending: what its attention function was given.
        tables: the family's cos and sin, or None where it rotates nothing.
    """
    query, key = attending.query, attending.key
    if tables is not None and mixer.rotary is not None:
        cos, sin = tables
        query, key = unrotate(family_rotation(module), query, key, cos, sin, mixer.rotary.spec.width)
    real = attending.real()
    place = (real.long().cumsum(1) - 1).clamp_min(0)
    features = mixer.features_of(query.detach(), key.detach(), place, attending.scaling)
    return weights_loss(*features, attending)


def language_stage(
    model: PreTrainedModel, config: Config, number: int, teacher: PreTrainedModel | None = None
) -> Stage:
    """Stage 2 (replaced layers only, scores frozen) or 3 (all parameters).

    Args:
        teacher: the unswapped model; None in stage 2, where the frozen originals are toggled in.
    """
    stage, idle = config.stage, None
    if number == 2:
        rates = {
            "projection": stage.lr_projection2,
            "map": stage.lr_map2,
            "gate": stage.lr_gate,
            "score": 0.0,
        }
        groups, names = local_groups(model, rates, stage.weight_decay)
        fields = {"projection": "lr_projection2", "map": "lr_map2", "gate": "lr_gate"}
        idle = why_idle(model, 2, fields, rates)
    else:
        names, parameters = [], []
        for name, parameter in model.named_parameters():
            # The choice of pairs has no gradient, so their scores stay as stage 1 left them.
            parameter.requires_grad_(".mixer.score." not in name)
            if parameter.requires_grad:
                names.append(name)
                parameters.append(parameter)
        groups = [
            {"params": parameters, "lr": stage.lr_stage3, "name": "all", "weight_decay": stage.weight_decay}
        ]
    needs_teacher = stage.objective != "ce"
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @contextmanager
    def as_teacher() -> Iterator[PreTrainedModel]:
        if teacher is not None:
            yield teacher
        else:
            with teacher_attention(model), at_rest(model):
                yield model

    def step(batch: Batch, scale: float | None) -> StepResult:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.padding, "use_cache": False}
        teacher_hidden, teacher_head = None, head_of(model)
        if needs_teacher:
            with torch.no_grad(), as_teacher() as source:
                teacher_hidden, teacher_head = final_hidden(source, inputs), head_of(source)
        with torch.set_grad_enabled(scale is not None):
            hidden = final_hidden(model, inputs)
        if scale is not None and not hidden.requires_grad:
            raise UserError(
                f"the loss of stage {number} ({NAMES[number]}) has no gradient; "
                f"frozen is everything but {len(names)} parameters."
            )
        loss = language_loss(
            hidden,
            teacher_hidden,
            head_of(model),
            teacher_head,
            batch.input_ids,
            batch.answers,
            batch.padding,
            stage.objective,
        )
        if scale is not None:
            (loss.total * scale).backward()
        return {"loss": float(loss.total.detach()), "kl": loss.kl, "ce": loss.ce, "answers": loss.answers}

    return Stage(number, groups, step, names, idle)


def final_hidden(model: PreTrainedModel, inputs: dict) -> Tensor:
    """`[B, T, C]`: what the output embedding is given."""
    return model.get_decoder()(**inputs).last_hidden_state


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Hidden states to logits, with the scaling or soft cap that some families put on them.

    Under autocast the weight is cast once here; autocast would cast a frozen one anew for every chunk.
    """
    config = model.config.get_text_config(decoder=True)
    embedding = model.get_output_embeddings()
    weight, bias = embedding.weight, getattr(embedding, "bias", None)
    if torch.is_autocast_enabled(weight.device.type):
        weight = weight.to(torch.get_autocast_dtype(weight.device.type))
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)

    def head(hidden: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, weight, bias)
        logits = logits * factor if factor != 1 else logits
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


@torch.no_grad()
def check_head(model: PreTrainedModel, ids: Tensor) -> None:
    """`head_of` must give the model's own logits, or the objective would be another model's.

    Raises:
        UserError: it does not.
    """
    want = model(input_ids=ids, use_cache=False).logits.float()
    got = head_of(model)(final_hidden(model, {"input_ids": ids, "use_cache": False})).float()
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))
    if not error < 1e-2:
        raise UserError(
            f"{type(model).__name__} changes its logits after the output embedding in a way "
            "that is not known here."
        )
