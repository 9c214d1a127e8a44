"""FSDP2: the decoder layers of a model in shards, one on each rank, while a stage trains.

`fully_shard` is called here directly, layer by layer, as accelerate's own preparation does after it: so what
two processes prove on a CPU is the code that runs on GPUs, where accelerate's config asks for it. No GPU has
run it yet. Embeddings, the last norm and, in stages 1 and 2, the replaced attention stay whole on every rank;
their gradients are summed as without shards. Between the stages the weights are whole again, for what is
measured and exported: they must fit a device, while gradients, the optimizer's moments and the second model
of stage 3 need not.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from replace import ranks
from replace.convert import attention_layers, parent_of, replaced_layers
from replace.launch import world

Model = TypeVar("Model", bound=PreTrainedModel)


@contextmanager
def shards(model: Model, number: int, wanted: bool) -> Iterator[Model]:
    """Yield what a stage trains: a twin of `model` in shards, or `model` itself where none are wanted.

    The twin takes over the weights: what is in shards `model` lacks within the block, and has back, whole and
    trained, when it ends well.

    Args:
        number: of the stage.
    """
    if not wanted:
        yield model
        return
    ranks.broadcast([*model.parameters()])
    twin = _twin(model)
    replaced = {id(p) for layer in replaced_layers(twin).values() for p in layer.parameters()}
    shard(twin, replaced if number < 3 else set())
    placed = {name: p for name, p in twin.named_parameters() if isinstance(p, DTensor)}
    own = {name: p for name, p in model.named_parameters() if name in placed}
    for parameter in own.values():
        parameter.data = parameter.data.new_empty(0)
    yield twin
    for name, parameter in own.items():
        parameter.data = placed[name].full_tensor().detach()
        parameter.requires_grad_(placed[name].requires_grad)


def shard(model: PreTrainedModel, exempt: set[int]) -> None:
    """Put the decoder layers' parameters in shards, in place, but for those whose ids are in `exempt`.

    What several layers share, or holds a single number, stays whole too.
    """
    mesh = init_device_mesh(model.device.type, (world(),))
    layers = list(dict.fromkeys(parent_of(model, path)[0] for path, _ in attention_layers(model)))
    owners: dict[int, int] = {}
    for layer in layers:
        for parameter in layer.parameters():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    outside = {p for p in model.parameters() if owners.get(id(p)) != 1 or p.ndim == 0 or id(p) in exempt}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=outside)
    decoder = model.get_decoder()
    fully_shard(decoder, mesh=mesh, ignored_params=outside)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a rank's loss is its share: the sum is what is wanted
            module.set_force_sum_reduction_for_comms(True)  # else by a reduction that only NCCL has
            if hasattr(module, "set_reduce_scatter_unused_params"):  # an expert that no token was sent to
                module.set_reduce_scatter_unused_params(True)


def in_shards(model: nn.Module) -> bool:
    """Whether any of a model's layers is."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(value: Tensor) -> Tensor:
    """A tensor whose shards, if it has any, are put together; all ranks must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, which every rank has, on the device of a parameter and in its shards."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    given = value.to(device=parameter.device, dtype=parameter.dtype)
    return distribute_tensor(given, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the gradients down to a norm of at most `limit`; returns the norm that they had."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [g for g in gradients if isinstance(g, DTensor)]
    if not parts:
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    rest = [g for g in gradients if not isinstance(g, DTensor)]
    sums = {"shards": _squares(part.to_local() for part in parts)}
    shared = ranks.sum_figures(sums, parts[0].device)["shards"]
    norm = (shared + _squares(rest)) ** 0.5
    factor = min(1.0, limit / (norm + 1e-6))
    for gradient in gradients:
        gradient.mul_(factor)
    return norm


def _squares(tensors: Iterable[Tensor]) -> float:
    """The sum of all squares; the host waits for the device once."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


def _twin(model: Model) -> Model:
    """A copy of the modules with the very same tensors; of the kept originals too."""
    conversion = getattr(model, "layer_replace", None)
    others = [] if conversion is None else conversion.originals.values()
    tensors = [t for module in (model, *others) for t in (*module.parameters(), *module.buffers())]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
