"""Terms of the tokens of texts: hidden states and attention of blocks, and logits of tokens.

Layers are named by the number of a block, from 0, and -1 is the last one; `embeddings` is what the
first block takes. Where no layers are named, each term has the mapping of its paper. A state is
that after a block, before the norm that some transformers have behind the last one.

The loss is the sum over the pairs of layers. Terms that compare token by token need the same tokens
on both sides.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.models.language import blocks
from kd.models.token_inputs import TokenInputs
from kd.objectives.attention_taps import Attention, AttentionTaps
from kd.objectives.feature_terms import LossFunction, TappedPairs, TeacherLayers, TermContext
from kd.objectives.loss_spec import LayerPair
from kd.objectives.step_outputs import StepOutputs
from kd.objectives.taps import EMBEDDINGS, try_out

MAX_RELATION_HEADS = 48  # MiniLM's second version, for teachers of 768 values
# Pairs of blocks of a student and a teacher with these numbers of blocks.
LayerMapping = Callable[[int, int], list[LayerPair]]


def uniform(student: int, teacher: int) -> list[LayerPair]:
    """Each student block with the last of its share of the teacher's: TinyBERT's g(m) = m N / M.

    Args:
        student, teacher: Numbers of blocks, M and N.

    Raises:
        ValueError: If N is no multiple of M.
    """
    if teacher % student:
        raise ValueError(f"{teacher} blocks of the teacher are no multiple of {student}")
    share = teacher // student
    return [(str(i), str((i + 1) * share - 1)) for i in range(student)]


def with_embeddings(student: int, teacher: int) -> list[LayerPair]:
    """The embeddings and `uniform`: TinyBERT's hidden states."""
    return [(EMBEDDINGS, EMBEDDINGS), *uniform(student, teacher)]


def skip(student: int, teacher: int) -> list[LayerPair]:
    """`uniform` without the last block: BERT-PKD's Skip."""
    return uniform(student, teacher)[:-1]


def last(student: int, teacher: int) -> list[LayerPair]:
    """The last block with the last block."""
    return [("-1", "-1")]


class StatePairs:
    """Hidden states of pairs of layers, token by token.

    Attributes:
        tapped: The taps on both networks.
        widths: Number of values of a state of the student and of the teacher, for each pair.
    """

    def __init__(self, name: str, context: TermContext, mapping: LayerMapping) -> None:
        self.tapped = TappedPairs(context, _layer_pairs(name, context, mapping))
        for layout in itertools.chain(*self.tapped.layouts):
            if layout.kind != "tokens":
                raise UserError(
                    f"--loss {name}: layer {layout.layer!r} gives one vector for a text, not one "
                    "for each token: name another layer"
                )
        self.widths = [(s.channels, t.channels) for s, t in self.tapped.layouts]

    def read(self) -> list[tuple[Tensor, Tensor]]:
        """The states of the last step, (n, l, d), pair by pair."""
        return self.tapped.read()


class HiddenTerm(nn.Module):
    """A loss of hidden states of blocks, the student's after a linear map to the teacher's width.

    The map is trained, also where the widths agree, and shared by all pairs, the embeddings too, as
    in the authors' code, whose figures are the published ones; their paper has a second map for the
    embeddings.

    Source: Jiao et al. (2020), arXiv:1909.10351, equations 8 and 9.
    """

    def __init__(self, context: TermContext, function: LossFunction) -> None:
        super().__init__()
        self.teacher = context.number
        self.states, self.function = StatePairs("hidden", context, with_embeddings), function
        self.teacher_layers = self.states.tapped.teacher_layers(self.teacher)
        widths = set(self.states.widths)
        if len(widths) > 1:
            raise UserError(
                "--loss hidden has one map for all layers, and theirs have different widths: "
                f"{_listed(widths)} (student=teacher)"
            )
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            self.map = nn.Linear(*widths.pop())

    def forward(self, step: StepOutputs) -> Tensor:
        mask = aligned_mask("hidden", step, self.teacher)
        pairs = self.states.read()
        losses = [self.function(_apply(self.map, s), t, mask) for s, t in pairs]
        return torch.stack(losses).sum()


class CosineTerm(nn.Module):
    """A loss of the angles of hidden states of blocks.

    The student's go through a linear map, one for each pair, only where the widths differ, which
    DistilBERT's do not.
    """

    def __init__(self, context: TermContext, function: LossFunction) -> None:
        super().__init__()
        self.teacher = context.number
        self.states, self.function = StatePairs("cosine", context, last), function
        self.teacher_layers = self.states.tapped.teacher_layers(self.teacher)
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            self.maps = nn.ModuleList(
                nn.Identity() if s == t else nn.Linear(s, t) for s, t in self.states.widths
            )

    def forward(self, step: StepOutputs) -> Tensor:
        mask = aligned_mask("cosine", step, self.teacher)
        pairs = zip(self.maps, self.states.read(), strict=True)
        losses = [self.function(_apply(each, s), t, mask) for each, (s, t) in pairs]
        return torch.stack(losses).sum()


class PatientTerm(nn.Module):
    """A loss of the states of the first token, [CLS]; the other tokens need not be the same."""

    def __init__(self, context: TermContext, function: LossFunction) -> None:
        super().__init__()
        self.teacher = context.number
        self.states, self.function = StatePairs("patient", context, skip), function
        for ours, theirs in self.states.widths:
            if ours != theirs:
                raise UserError(
                    f"--loss patient compares vectors of one width: the student's have {ours} "
                    f"values and the teacher's {theirs}: use hidden or srd"
                )
        self.teacher_layers = self.states.tapped.teacher_layers(self.teacher, "first")

    def forward(self, step: StepOutputs) -> Tensor:
        pairs = self.states.tapped.read_vectors(step.batch, self.teacher, "first")
        return torch.stack([self.function(s, t) for s, t in pairs]).sum()


class AttentionPairs:
    """What goes into the attention of pairs of blocks.

    Attributes:
        heads: Number of heads of the student's and the teacher's block, for each pair.
        widths: Number of values of all heads of a token, likewise.
    """

    def __init__(self, name: str, context: TermContext, mapping: LayerMapping) -> None:
        self._name = name
        pairs = _layer_pairs(name, context, mapping)
        networks = context.student.network, context.teacher_network
        ours, theirs = (
            [_block_number(name, network, layers[side]) for layers in pairs]
            for side, network in enumerate(networks)
        )
        self._pairs = list(zip(ours, theirs, strict=True))
        self._student, self._teacher = (
            AttentionTaps(network, numbers)
            for network, numbers in zip(networks, (ours, theirs), strict=True)
        )
        assert context.teacher is not None
        try_out(context.student, context.sample)
        try_out(context.teacher, context.sample)
        tried = self.read()
        self.heads = [(s.query.shape[1], t.query.shape[1]) for s, t in tried]
        self.widths = [(_width(s), _width(t)) for s, t in tried]

    def read(self) -> list[tuple[Attention, Attention]]:
        """What went into the attention of the last step, pair by pair."""
        ours, theirs = self._student.read(), self._teacher.read()
        return [(ours[s], theirs[t]) for s, t in self._pairs]

    def score_bytes(self, lengths: Int[np.ndarray, " n"]) -> int:
        """Bytes in float32 of the teacher's attention scores for texts of these lengths."""
        heads = {
            block: heads for (_, block), (_, heads) in zip(self._pairs, self.heads, strict=True)
        }
        return 4 * sum(heads.values()) * int(np.square(lengths.astype(np.int64)).sum())

    def projection_bytes(self, lengths: Int[np.ndarray, " n"]) -> int:
        """Bytes in float32 of the teacher's queries, keys and values for such texts."""
        widths = {
            block: width for (_, block), (_, width) in zip(self._pairs, self.widths, strict=True)
        }
        return 4 * 3 * sum(widths.values()) * int(lengths.sum())

    def refuse_other_heads(self) -> None:
        """Refuse blocks whose numbers of heads differ."""
        for (ours, theirs), widths in zip(self.heads, self.widths, strict=True):
            if ours != theirs:
                raise UserError(
                    f"--loss {self._name} compares heads: the student's block has {ours} and the "
                    f"teacher's {theirs}: use relations:1:heads={_relation_heads(*widths)}"
                )


class ScoresTerm(nn.Module):
    """A loss of the attention scores of blocks with as many heads."""

    def __init__(self, context: TermContext, function: LossFunction) -> None:
        super().__init__()
        self.teacher = context.number
        self.attention, self.function = AttentionPairs("scores", context, uniform), function
        self.attention.refuse_other_heads()
        self.teacher_layers = TeacherLayers(self.teacher, self.attention.score_bytes)

    def forward(self, step: StepOutputs) -> Tensor:
        mask = aligned_mask("scores", step, self.teacher)
        pairs = self.attention.read()
        losses = [self.function(s.scores, t.scores, mask, s.causal or t.causal) for s, t in pairs]
        return torch.stack(losses).sum()


class RelationsTerm(nn.Module):
    """A loss of the relations of queries, keys and values of blocks, whatever their widths."""

    def __init__(self, context: TermContext, function: partial) -> None:
        super().__init__()
        self.teacher = context.number
        self.attention, self.function = AttentionPairs("relations", context, last), function
        self.teacher_layers = TeacherLayers(self.teacher, self.attention.projection_bytes)
        heads = function.keywords.get("heads", 0)
        if not heads:
            self.attention.refuse_other_heads()
            return
        for ours, theirs in self.attention.widths:
            if ours % heads or theirs % heads:
                raise UserError(
                    f"--loss relations: heads={heads} must divide {ours} values of the student's "
                    f"block and {theirs} of the teacher's: use heads="
                    f"{_relation_heads(ours, theirs)}"
                )

    def forward(self, step: StepOutputs) -> Tensor:
        mask = aligned_mask("relations", step, self.teacher)
        losses = [
            self.function(
                (s.query, s.key, s.value), (t.query, t.key, t.value), mask, s.causal or t.causal
            )
            for s, t in self.attention.read()
        ]
        return torch.stack(losses).sum()


class TokenLabelTerm(nn.Module):
    """A loss of the student's logits of tokens and their targets."""

    def __init__(self, name: str, function: LossFunction, contexts: Sequence[TermContext]) -> None:
        super().__init__()
        _require_texts(name, contexts[0])
        self.name, self.function = name, function

    def forward(self, step: StepOutputs) -> Tensor:
        targets = step.batch.token_targets
        if targets is None or step.student_logits.ndim != 3:
            raise UserError(
                f"--loss {self.name} takes logits and targets of tokens, which these texts have "
                "not: use ce"
            )
        return self.function(step.student_logits, targets)


class TokenLogitTerm(nn.Module):
    """A loss of the student's logits of tokens and the teachers'.

    Several teachers are their mean probabilities at the temperature of the loss.
    """

    def __init__(self, name: str, function: partial, contexts: Sequence[TermContext]) -> None:
        super().__init__()
        _require_texts(name, contexts[0])
        self.name, self.function = name, function
        self.temperature = function.keywords["temperature"]

    def forward(self, step: StepOutputs) -> Tensor:
        if step.student_logits.ndim != 3:
            raise UserError(
                f"--loss {self.name} takes logits of tokens, and these are of texts: use kd"
            )
        targets = step.batch.token_targets
        if self.function.keywords["targets"] and targets is None:
            raise UserError(
                f"--loss {self.name}: targets=1 needs tokens with a target, which these texts have "
                "not: leave it out"
            )
        masks = [aligned_mask(self.name, step, i) for i in range(len(step.teacher_logits))]
        if len(masks) == 1:
            return self.function(step.student_logits, step.teacher_logits[0], masks[0], targets)
        real = step.tokens(masks[0])
        labels = real.batch.labels[None]
        teacher = real.combined_logits(self.temperature)
        mask = torch.ones_like(labels, dtype=torch.bool)
        return self.function(real.student_logits[None], teacher[None], mask, labels)


def aligned_mask(name: str, step: StepOutputs, teacher: int) -> Bool[Tensor, "n l"]:
    """The real tokens of student and teacher.

    Args:
        name: Name of the term, for the message.
        step: Outputs of a step.
        teacher: Number of the teacher.

    Raises:
        UserError: If their texts have different lengths.
    """
    ours, theirs = step.mask, step.teacher_mask(teacher)
    if ours.shape != theirs.shape:
        raise UserError(
            f"--loss {name} compares token by token, and the student's texts have {ours.shape[1]} "
            f"tokens where the teacher's have {theirs.shape[1]}: use kd, or one tokenizer for both"
        )
    return ours


def _layer_pairs(name: str, context: TermContext, mapping: LayerMapping) -> Sequence[LayerPair]:
    """The pairs of layers that the user named, or those of the mapping."""
    _require_texts(name, context)
    networks = context.student.network, context.teacher_network
    if context.pairs:
        for pair in context.pairs:
            for network, layer in zip(networks, pair, strict=True):
                if layer == EMBEDDINGS or _is_number(layer):
                    _count_blocks(name, network)
        return context.pairs
    ours, theirs = (_count_blocks(name, network) for network in networks)
    try:
        pairs = mapping(ours, theirs)
    except ValueError as error:
        raise UserError(
            f"--loss {name}: {error}: name the layers, as in {name}@0={theirs // 2},"
            f"{ours - 1}={theirs - 1} (student=teacher)"
        ) from error
    if not pairs:
        raise UserError(
            f"--loss {name} leaves the last block out, and the student has no other: name the "
            f"layers, as in {name}@0={theirs - 1} (student=teacher)"
        )
    return pairs


def _require_texts(name: str, context: TermContext) -> None:
    if not isinstance(context.sample, TokenInputs):
        raise UserError(f"--loss {name} takes tokens of texts: with images use fitnet or kd")


def _count_blocks(name: str, network: nn.Module) -> int:
    if not blocks.exist(network):
        raise UserError(
            f"--loss {name} compares blocks of transformers, and {type(network).__name__} has "
            "none: use kd, logits, or a loss of vectors such as srd"
        )
    return len(blocks.find(network)[1])


def _block_number(name: str, network: nn.Module, layer: str) -> int:
    if not _is_number(layer):
        raise UserError(
            f"--loss {name} takes numbers of blocks, as in {name}@0=1 (student=teacher), got "
            f"{layer!r}"
        )
    return int(blocks.name_of(network, int(layer)).rpartition(".")[2])


def _is_number(layer: str) -> bool:
    return re.fullmatch(r"-?\d+", layer) is not None


def _width(attention: Attention) -> int:
    return attention.query.shape[1] * attention.query.shape[3]


def _relation_heads(student: int, teacher: int) -> int:
    """The largest number of relation heads up to 48 that divides both widths."""
    numbers = range(MAX_RELATION_HEADS, 0, -1)
    return next(heads for heads in numbers if student % heads == teacher % heads == 0)


def _apply(layer: nn.Module, states: Tensor) -> Tensor:
    """Apply a map in the precision of its weights, unless autocast sets it."""
    weight = next(layer.parameters(), None)
    if weight is None or torch.is_autocast_enabled(states.device.type):
        return layer(states)
    return layer(states.to(weight.dtype))


def _listed(widths: set[tuple[int, int]]) -> str:
    return ", ".join(f"{s}={t}" for s, t in sorted(widths))
