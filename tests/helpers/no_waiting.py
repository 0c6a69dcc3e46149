"""What the host must not do between launches: a mode in which waiting for a GPU fails, on tensors of any device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What waits for a GPU, or takes the matrices of a batch one by one there (torch 2.11): reads of values, shapes that
# depend on values, decompositions that look at their error code.
WAITS = {
    *("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "_unique2", "bincount"),
    *("_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_qr", "linalg_lstsq", "linalg_ldl_solve"),
    *("cholesky_inverse", "_cholesky_solve_helper", "_linalg_check_errors"),
}


class NoHost(TorchDispatchMode):
    """Fails where the host would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        chosen = args[1] if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) else ()
        assert func.overloadpacket.__name__ not in WAITS, func
        assert not any(x is not None and x.dtype == torch.bool for x in chosen), f"{func} counts what is true"
        return func(*args, **(kwargs or {}))
