"""Classes of the data joined to groups, which a student learns in their place.

A teacher of the classes teaches the groups as well: the probability of a group is the sum of those
of its classes, so its logit is their log-sum-exp. That is exact for the teacher's softmax; a
temperature then softens the distribution over groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsdistill.harness import checksums
from dsdistill.harness.data.class_names import natural_key
from dsdistill.harness.errors import UserError, unknown_name
from kd.models.zoo import class_names
from kd.models.zoo.class_names import BY_FEATURES, ClassMap, Match


@dataclass(frozen=True)
class ClassGroups:
    """The group of each class of the data.

    Attributes:
        members: Class names of the data, in label order.
        classes: Names of the groups, in the order of the student's outputs.
        group_of: Index of the group of each class of the data.
    """

    members: tuple[str, ...]
    classes: tuple[str, ...]
    group_of: tuple[int, ...]

    @property
    def by_name(self) -> dict[str, str]:
        """Class of the data -> its group."""
        groups = (self.classes[group] for group in self.group_of)
        return dict(zip(self.members, groups, strict=True))

    @property
    def digest(self) -> str:
        """SHA-256 of all names."""
        return checksums.json_digest([self.by_name, self.classes])

    def of(self, names: Sequence[str], who: str) -> tuple[int, ...] | None:
        """The group of each of some classes; None where these are the groups already.

        Args:
            names: Class names of data, which may be only some of the members.
            who: What learned the groups, for messages.

        Raises:
            UserError: If a class is no member.
        """
        if len(names) == len(self.classes):
            outputs = class_names.match_by_name(names, self.classes)
            if outputs is not None:
                return None
        found = [class_names.match_by_name(self.members, [name]) for name in names]
        for name, members in zip(names, found, strict=True):
            if members is None:
                what = f"class of the data, which {who} has no group for,"
                raise unknown_name(what, name, self.members)
        return tuple(self.group_of[members[0]] for members in found if members)


def make(groups: Sequence[str], members: Sequence[str], who: str) -> ClassGroups:
    """Join classes to groups, in natural order.

    Args:
        groups: Name of the group of each class.
        members: Class names of the data, in label order.
        who: What names the groups, for messages.

    Raises:
        UserError: If all classes are of one group.
    """
    classes = tuple(sorted(set(groups), key=natural_key))
    if len(classes) < 2:
        raise UserError(f"{who} joins all classes to one group: name at least two")
    return ClassGroups(tuple(members), classes, tuple(map(classes.index, groups)))


def restore(stored: Mapping[str, str], classes: Sequence[str]) -> ClassGroups:
    """The groups that a student has learned.

    Args:
        stored: Class -> group, as `ClassGroups.by_name` in the training.
        classes: Groups in the order of the student's outputs.
    """
    return ClassGroups(tuple(stored), tuple(classes), tuple(map(classes.index, stored.values())))


def match(
    compare: Callable[..., Match],
    who: str,
    model_classes: Sequence[str] | int,
    groups: ClassGroups,
    class_map: ClassMap | None,
    option: str,
) -> Match:
    """Match a teacher's outputs with the groups, or with the classes that are joined to them.

    Args:
        compare: `class_names.match` or `class_names.match_if_same`.
        who, model_classes, class_map, option: As for these.
        groups: The groups; a class map is of them, or of the classes of the data.

    Raises:
        UserError: If the outputs are neither.
    """
    rest = class_map, option
    if _knows_groups(model_classes, groups, class_map):
        return compare(who, model_classes, groups.classes, *rest)
    matched = compare(who, model_classes, groups.members, *rest)
    if matched is BY_FEATURES:
        return matched
    return replace(matched, how=f"{matched.how}, summed to groups", groups=groups.group_of)


def _knows_groups(
    model_classes: Sequence[str] | int, groups: ClassGroups, class_map: ClassMap | None
) -> bool:
    """Whether a teacher's outputs are the groups themselves."""
    if class_map is not None:
        return not {*class_map} <= {*groups.members}
    count = model_classes if isinstance(model_classes, int) else len(model_classes)
    if count != len(groups.classes):
        return False
    if isinstance(model_classes, int) or class_names.are_placeholders(model_classes):
        return count != len(groups.members)
    return class_names.match_by_name(model_classes, groups.classes) is not None


def member_table(group_of: Sequence[int]) -> Int[Tensor, "g m"]:
    """The members of each group, filled up with the number of all members, which is none.

    Args:
        group_of: Index of the group of each member; every group has one.
    """
    members: list[list[int]] = [[] for _ in range(max(group_of) + 1)]
    for member, group in enumerate(group_of):
        members[group].append(member)
    most = max(map(len, members))
    return torch.tensor([[*own, *[len(group_of)] * (most - len(own))] for own in members])


def group_logits(logits: Float[Tensor, "n k"], table: Int[Tensor, "g m"]) -> Float[Tensor, "n g"]:
    """log Σ exp of the logits of each group's members: its softmax sums their probabilities.

    Args:
        logits: Unnormalised log-probabilities of k classes.
        table: As `member_table`.
    """
    none = logits.new_full((len(logits), 1), float("-inf"))
    return torch.cat([logits, none], 1)[:, table].logsumexp(-1)
