"""Which layers to replace, measured: what a swap of theirs costs after a short transfer.

All layers are transferred in one pass over the text, since each learns from its own teacher's input and
output (stage 1, `distill.stages`). Any set of them is then put in place and read on held-out text: the KL to
the teacher, and the share of needles' tokens that are still predicted. Only text of the dev split is measured
on, never test.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.data import Mixture
from distill.objective import language_loss
from distill.stages import final_hidden, head_of, transfer_stage
from distill.trainer import learning_rate
from replace.choice import layers_of, spec_of
from replace.config import Config, StageBudget
from replace.convert import SwapSpec, attention_layers, parent_of, replaced_layers, restore, swap
from replace.corpora import Document, blocks, choosing_split
from replace.episodes import Episode, haystack, make_episode
from replace.precision import autocast, cast_once, dtype_of
from replace.ranking import VERSION, baselines, check_k, independent_order, measurements, order_of
from replace.retrieval import protocol, retrieval_scores

logger = logging.getLogger(__name__)

SEED = 0
"""Of the rows and needles: the same in every run, whatever its training seed, so that rankings compare."""
KINDS = ("passkey", "sentence")
TRANSFER_COST = 2.5
"""Of a token of the transfer, in tokens of a measurement: a forward, and the new layers' work."""


@dataclass(frozen=True)
class Figures:
    """Of a model with some layers replaced: `kl` to the teacher in nats a token of text, its standard error
    over rows (None for a single one), and the share of the needles' tokens that are the most likely ones.
    """

    kl: float
    kl_error: float | None
    recall: float


def rank(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], config: Config
) -> dict[str, Any]:
    """The ranking that `config.layers` asks for, as `replace.ranking` describes it.

    The model and the random state are left as they were.

    Raises:
        UserError: the text is too short.
    """
    known = [document for document in documents if document.split != "test"]
    layers, indices = config.layers, layers_of(model)
    k = min(layers.k, len(indices))
    began = time.perf_counter()
    ranking: dict[str, Any] = {
        "version": VERSION, "select": layers.select, "k": k,
        "model": asdict(config.model), "attention": config.attention.name, "rest": layers.rest,
    }  # fmt: skip
    with _left_alone(model, config.seed):
        if layers.select == "retrieval":
            ranking |= _by_retrieval(model, tokenizer, known, config, k)
        else:
            ranking |= _by_cost(model, tokenizer, known, config, k)
    ranking["seconds"]["spent"] = round(time.perf_counter() - began, 1)
    foreseen = ranking["seconds"]["foreseen"]
    words = "" if foreseen is None else f", {foreseen / 60:.1f} foreseen"
    logger.info("layers=%s took %.1f minutes%s", layers.select, ranking["seconds"]["spent"] / 60, words)
    return ranking


def _by_cost(model, tokenizer, documents: list[Document], config: Config, k: int) -> dict[str, Any]:
    """`layers=auto`: what each layer costs alone, the orders, and whole sets."""
    layers, indices = config.layers, layers_of(model)
    check_k(layers, len(indices))
    trial = Trial(model, tokenizer, documents, config)
    replaced = trial.transferred(SwapSpec(dict.fromkeys(indices, config.attention)))
    known: dict[tuple[int, ...], Figures] = {}
    bar = tqdm(total=measurements(layers, len(indices))[0], desc="choosing layers", leave=False)

    def figures(chosen: Sequence[int]) -> Figures:
        key = tuple(sorted(chosen))
        if key not in known:
            known[key] = trial.measure({index: replaced[index] for index in key})
            bar.update()
        return known[key]

    def cost(chosen: Sequence[int]) -> float:
        found = figures(chosen)
        lost = max(0.0, trial.teacher.recall - found.recall)  # more than the teacher's is no merit
        total = found.kl + layers.recall_weight * lost
        return total if math.isfinite(total) else math.inf

    alone = {index: cost([index]) for index in indices}
    orders = {"independent": independent_order(alone)}
    if layers.search == "greedy":
        orders["greedy"] = greedy(cost, indices, k)
    sets = {name: sorted(order[:k]) for name, order in orders.items()} | baselines(indices, k, config.seed)
    result = {
        "orders": orders,
        "layers": [{"layer": i, "cost": alone[i], **asdict(figures([i]))} for i in indices],
        "sets": trial.compared(sets, figures) if layers.compare else _not_compared(),
        **trial.about(),
    }
    bar.close()
    logger.info("cheapest layers first: %s", ", ".join(map(str, orders[order_of(layers)][:k])))
    return result


def _by_retrieval(model, tokenizer, documents: list[Document], config: Config, k: int) -> dict[str, Any]:
    """`layers=retrieval`: where the teacher looks at the needle; whole sets, each with its own rest."""
    indices = layers_of(model)
    scores = retrieval_scores(model, tokenizer, documents)
    order = independent_order({index: -share for index, share in scores.items()})
    shares = ", ".join(f"{i} ({scores[i]:.2f})" for i in sorted(order[:k]))
    logger.info("retrieval layers: %s", shares)
    result: dict[str, Any] = {
        "orders": {"retrieval": order},
        "layers": [{"layer": index, "share": scores[index]} for index in indices],
        "sets": _not_compared(),
        "protocol": protocol(model, documents),
        "seconds": {"foreseen": None},
    }
    if config.layers.compare:
        trial = Trial(model, tokenizer, documents, config)
        sets = {"retrieval": sorted(order[:k]), **baselines(indices, k, config.seed)}

        def figures(chosen: Sequence[int]) -> Figures:
            return trial.measure(trial.transferred(spec_of(config, indices, list(chosen))))

        result["sets"] = trial.compared(sets, figures)
        about = trial.about()
        result |= {"teacher": about["teacher"], "seconds": about["seconds"]}
        result["protocol"] |= {"sets": about["protocol"]}
    return result


def _not_compared() -> dict[str, str]:
    return {"why": "layers.compare=false"}


def greedy(cost: Callable[[Sequence[int]], float], indices: Sequence[int], k: int) -> list[int]:
    """k layers one after the other, each the one that costs least beside those before it."""
    chosen: list[int] = []
    for _ in range(k):
        left = [index for index in indices if index not in chosen]
        chosen.append(min(left, key=lambda index: (cost([*chosen, index]), index)))
    return chosen


class Trial:
    """A teacher's predictions on dev text, and how far layers put in place of its own are from them.

    Attributes:
        teacher: the teacher's own figures.
        seconds: what one measurement takes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: list[Document],
        config: Config,
    ) -> None:
        """
        Args:
            documents: without the test split.

        Raises:
            UserError: the text is too short.
        """
        self.model, self.tokenizer, self.documents, self.config = model, tokenizer, documents, config
        self.split, budget = choosing_split(documents), config.budget.choice
        chosen = [document for document in documents if document.split == self.split]
        rows = blocks(chosen, tokenizer, budget.length)
        places = torch.linspace(0, len(rows) - 1, min(budget.rows, len(rows))).long()
        self.rows = rows[places].to(model.device)
        self.episodes = self._episodes()
        self.skipped = 0
        with torch.no_grad():
            self.hidden = [final_hidden(model, _inputs(row)) for row in self.rows]
        began = time.perf_counter()
        self.teacher = self.measure({})
        self.seconds = time.perf_counter() - began
        many, transfers = measurements(config.layers, len(layers_of(model)))
        read = self.rows.numel() + sum(len(episode.input_ids) for episode in self.episodes)
        trained = transfers * budget.tokens
        self.foreseen = self.seconds * (many + TRANSFER_COST * trained / read)
        logger.info(
            "layers=%s: %d measurements of %s tokens (%.1f s each) and a transfer of %s: about %.1f minutes",
            config.layers.select, many, f"{read:,}", self.seconds, f"{trained:,}", self.foreseen / 60,
        )  # fmt: skip

    def _episodes(self) -> list[Episode]:
        """Needles at depths from the start on, outside of the exact part."""
        config, budget = self.config, self.config.budget.choice
        source, rng = haystack("novel", self.documents, self.tokenizer), random.Random(f"choice {SEED}")
        attention = config.attention
        clear = attention.block + (0 if attention.local == "segment" else attention.window)
        return [
            make_episode(
                self.tokenizer,
                rng,
                budget.length,
                0.9 * (number + 0.5) / budget.episodes,
                KINDS[number % len(KINDS)],
                source,
                self.split,
                clear=clear,
            )
            for number in range(budget.episodes)
        ]

    def transferred(self, spec: SwapSpec) -> dict[int, nn.Module]:
        """The replaced layers of `spec` after the short transfer, beside a model that is as it was."""
        swap(self.model, spec, keep_originals=True)
        try:
            if self.config.budget.choice.tokens:
                with cast_once(self.model, self.config.precision):
                    self._train()
            layers: dict[int, nn.Module] = dict(replaced_layers(self.model))
        finally:
            restore(self.model)
        return {index: layer.eval().requires_grad_(False) for index, layer in layers.items()}

    def _train(self) -> None:
        """Stage 1 with its losses, rates and rows, in few steps and without checkpoints."""
        config, budget, device = self.config, self.config.budget.choice, self.model.device
        stage = transfer_stage(self.model, config)
        if stage.idle is not None:
            logger.warning("%s; the layers are measured as they are", stage.idle)
            return
        size = StageBudget(budget.tokens, budget.batch, budget.length)
        share = config.data.recall_transfer
        mixture = Mixture(self.tokenizer, self.documents, config, size, stage=1, share=share)
        optimizer = torch.optim.AdamW(stage.groups, betas=(0.9, 0.99))
        base = [group["lr"] for group in optimizer.param_groups]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # fp16 would need a scaler; a few steps can do without it.
        half = dtype_of(config.precision, device) == torch.float16
        steps = -(-budget.tokens // (budget.batch * budget.length))
        for step in tqdm(range(steps), desc="short transfer", leave=False):
            factor = learning_rate(step, steps, config.stage.warmup)
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
            batch = mixture.batch(step)
            batch.input_ids, batch.answers = batch.input_ids.to(device), batch.answers.to(device)
            with autocast("fp32" if half else config.precision, device):
                stage.step(batch, 1.0)
            if math.isfinite(float(nn.utils.clip_grad_norm_(parameters, config.stage.clip))):
                optimizer.step()
            else:
                self.skipped += 1
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def measure(self, layers: Mapping[int, nn.Module]) -> Figures:
        """The figures of the model with these layers in place.

        In fp32: bf16's rounding alone is 0.001 nats of the default teacher, more than its cheapest layers.
        """
        model, head = self.model, head_of(self.model)
        with in_place(model, layers):
            kl = [
                _divergence(final_hidden(model, _inputs(row)), hidden, head, row)
                for row, hidden in zip(self.rows, self.hidden, strict=True)
            ]
            right = total = 0
            for episode in self.episodes:
                ids, answer = episode.input_ids.to(model.device), episode.answer
                hidden = final_hidden(model, _inputs(ids))[0, answer.start - 1 : answer.stop - 1]
                right += int((head(hidden).argmax(-1) == ids[answer]).sum())
                total += answer.stop - answer.start
        error = stdev(kl) / math.sqrt(len(kl)) if len(kl) > 1 else None
        return Figures(fmean(kl), error, right / total)

    def compared(
        self, sets: Mapping[str, list[int]], figures: Callable[[Sequence[int]], Figures]
    ) -> list[dict[str, Any]]:
        """A line for each set."""
        return [{"name": name, "layers": chosen, **asdict(figures(chosen))} for name, chosen in sets.items()]

    def about(self) -> dict[str, Any]:
        """How it was measured, for the ranking."""
        budget = self.config.budget.choice
        return {
            "teacher": {"recall": self.teacher.recall},
            "protocol": {
                "text": self.split,
                "rows": len(self.rows),
                "episodes": len(self.episodes),
                "length": budget.length,
                "transfer_tokens": budget.tokens,
                "skipped_steps": self.skipped,
                "recall_weight": self.config.layers.recall_weight,
            },
            "seconds": {"foreseen": round(self.foreseen, 1)},
        }


def _inputs(ids: Tensor) -> dict[str, Any]:
    """Of one row `[T]`."""
    return {"input_ids": ids.unsqueeze(0), "use_cache": False}


def _divergence(hidden: Tensor, teacher: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """KL from the teacher's predictions in nats a token; hidden and teacher are `[1, T, C]`, ids `[T]`."""
    row = ids.unsqueeze(0)
    none = torch.zeros_like(row, dtype=torch.bool)
    return language_loss(hidden, teacher, head, head, row, none, None, "kl").kl


@contextmanager
def in_place(model: nn.Module, layers: Mapping[int, nn.Module]) -> Iterator[None]:
    """Within the block these modules stand where the attention of their layers was."""
    places = [
        (*parent_of(model, path), module)
        for path, module in attention_layers(model)
        if module.layer_idx in layers
    ]
    try:
        for parent, name, module in places:
            setattr(parent, name, layers[module.layer_idx])
        yield
    finally:
        for parent, name, module in places:
            setattr(parent, name, module)


@contextmanager
def _left_alone(model: nn.Module, seed: int) -> Iterator[None]:
    """A run goes on as if nothing had been measured: its own random numbers, parameters as they were.

    So a run that takes its ranking from a file equals the one that measured it.
    """
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    device = next(model.parameters()).device
    model.requires_grad_(False)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
