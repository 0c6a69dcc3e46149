"""Theseus: move a fine-tune or a LoRA adapter to another model, without training (arXiv 2602.12952).

From here, :func:`align` and :func:`transport` take running models, whole. The command ``theseus`` moves between folders
block by block, for models of any size; in Python that is ``theseus_transport.jobs.transport_job``'s ``Session``.
"""

from .alignment.align import align
from .alignment.alignment import Alignment
from .errors import InputRefused, NumericalError, ResourceError, TheseusError
from .models.families import register
from .models.family import Embedding, Family
from .recipes.recipe import Recipe
from .streaming.whole_models import transport
from .updates.delta import Delta
from .updates.update import Update
from .version import __version__

__all__ = [
    "__version__",
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
