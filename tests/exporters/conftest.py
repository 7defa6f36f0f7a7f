"""One export for all tests of this folder: half of its time is a fixed cost of torch.onnx."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The toy model.flux, and what `fluxc.export` made of it for ONNX."""
    import fluxc
    from fluxc.testing import tiny_tokenizer
    from fluxc.toy_flux import toy_flux

    folder = tmp_path_factory.mktemp("export")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    files = {path.name: path.read_text() for path in (folder / "tokenizer").iterdir()}
    flux = toy_flux(folder / "toy.flux", tokenizer_files=files)
    return flux, fluxc.export(flux.path, target="onnx", output=folder / "engine")
