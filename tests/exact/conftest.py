import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def rms_norm(self, hidden_states):
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    z = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * z.to(hidden_states.dtype)


@pytest.fixture(autouse=True)
def exact_rms_norm(monkeypatch):
    """transformers' RMSNorms round to float32 even in a float64 model: a floor of 5e-7 under every control."""
    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", rms_norm)


@pytest.fixture(autouse=True)
def one_thread():
    """Models of width 24 spend more time handing work to threads than doing it (ten times, on a busy machine)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
