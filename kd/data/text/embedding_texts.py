"""Texts to embed: single ones, pairs of which each text is embedded, and translations.

A row of two columns becomes two texts. Those of the first column come before those of the second,
so that row i of n has the texts i and n + i.
"""

from itertools import chain

from kd.data.text.corpus import TextPart


def of_student(part: TextPart) -> TextPart:
    """The texts that the student embeds, one column.

    Args:
        part: Rows of one or two texts.
    """
    return TextPart((list(chain(*part.texts)),))


def of_teacher(part: TextPart, *, parallel: bool) -> TextPart:
    """The text that a teacher embeds for each text of the student.

    Args:
        part: Rows of one or two texts.
        parallel: Whether the second text of a row is a translation of the first: the teacher then
            embeds the first for both, since it need not know the second one's language.

    Source: Reimers and Gurevych (2020), arXiv:2004.09813, section 2.
    """
    return TextPart((list(part.texts[0]) * 2,)) if parallel else of_student(part)
