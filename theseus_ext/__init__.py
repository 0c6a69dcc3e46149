"""C++ and CUDA operations of Theseus. Importing registers them as ``torch.ops.theseus_ext.*``."""

import torch  # noqa: F401  first: _C links against the libraries it loads

try:
    from theseus_ext._C import build_info
except ImportError as error:
    raise ImportError(
        f"theseus_ext._C cannot be loaded ({error}). Build it against the installed torch {torch.__version__}: "
        "pip install --no-build-isolation -e . in the checkout, or reinstall theseus-transport."
    ) from error

from theseus_ext import reference
from theseus_ext.devices import cuda_problem
from theseus_ext.ops import Mixing, cross_moment_, cross_moments_, effect_moment_, polar, svd, svdvals

__all__ = [
    "Mixing",
    "build_info",
    "cross_moment_",
    "cross_moments_",
    "cuda_problem",
    "effect_moment_",
    "polar",
    "reference",
    "svd",
    "svdvals",
]
