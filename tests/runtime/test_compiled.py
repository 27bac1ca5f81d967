"""torch.compile: what it needs, and one compilation that all promises of a backend are held against.

tests/runtime/test_backends.py holds them one by one, marked slow: each batch size there is compiled anew.
"""

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch._inductor import config

from dpctl.errors import DpctlError
from runtime.backends import compiled, eager


def test_one_compilation_keeps_the_promises(model_directory: Path) -> None:
    # As the sampling loop makes them: to torch.compile a tensor of inference mode is another kind.
    with torch.inference_mode():
        sample, timestep = (
            torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
            torch.tensor([0.5, 40.0, 99.0]),
        )
    before = sample.clone()
    with eager.open_denoiser(model_directory) as plain:
        expected, other = plain(sample, timestep), plain(2 * sample, timestep)
    with compiled.open_denoiser(model_directory) as denoiser:
        found = denoiser(sample, timestep)
        torch.testing.assert_close(denoiser(2 * sample, timestep), other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # not overwritten meanwhile
        turned = sample.transpose(2, 3).contiguous().transpose(2, 3)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(denoiser(turned, timestep), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(sample, before)
        network = weakref.ref(denoiser._network)
        weights = weakref.ref(next(denoiser._network.parameters()))
    gc.collect()
    assert (network(), weights()) == (None, None)


def test_without_a_compiler_it_says_what_it_needs(model_directory: Path) -> None:
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(DpctlError, match=r"(?s)needs a C\+\+ compiler.*no-such-compiler.*install a C\+\+ compiler"),
    ):
        compiled.open_denoiser(model_directory)


def test_on_a_gpu_it_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(DpctlError, match="needs triton"):
        compiled.require("cuda")
