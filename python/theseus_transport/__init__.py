"""Theseus: move a fine-tune or a LoRA adapter to another model, without training (arXiv 2602.12952).

From here, :func:`align` and :func:`transport` take running models, whole. The command ``theseus`` moves between folders
block by block, for models of any size; in Python that is :class:`theseus_transport.job.Job` and its ``Session``.
"""

from .alignment import Alignment, align
from .delta import Delta
from .errors import InputRefused, NumericalError, ResourceError, TheseusError
from .families import register
from .family import Embedding, Family
from .recipes import Recipe
from .transport import transport
from .update import Update

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "Delta",
    "Embedding",
    "Family",
    "InputRefused",
    "NumericalError",
    "Recipe",
    "ResourceError",
    "TheseusError",
    "Update",
    "align",
    "register",
    "transport",
]
