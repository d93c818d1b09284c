from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from stellar_plugin import Stellar
from stellar_plugin.checkpoints import files, read_checkpoint
from tests import reference

HEAD_COUNTS = {"num_heads": 3, "decoder_num_heads": 4}


class FakeHub:
    """A hub whose files lie in a folder; remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    def download(self, repo: str, name: str, **kwargs: Any) -> str:
        self.asked.append((repo, name, kwargs))
        if not (self.folder / name).is_file():
            raise EntryNotFoundError(f"{name} not found")
        return str(self.folder / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    folder = tmp_path / "hub"
    folder.mkdir()
    hub = FakeHub(folder)
    monkeypatch.setattr(files, "hf_hub_download", hub.download)
    monkeypatch.chdir(tmp_path)
    return hub


class TestReleased:
    @pytest.mark.parametrize("name", ["b8", "b16", "b24", "l16", "h16"])
    def test_short_names(self, hub: FakeHub, name: str) -> None:
        file = f"stellar-{name}.safetensors"
        save_file(reference.weights(), hub.folder / file)
        short = Stellar.from_pretrained(
            f"stellar-{name}", revision="abc", local_files_only=True, **HEAD_COUNTS
        )
        full = Stellar.from_pretrained("microsoft/STELLAR", variant=name, **HEAD_COUNTS)
        assert short.state_dict().keys() == full.state_dict().keys()
        assert hub.asked == [
            (
                "microsoft/STELLAR",
                file,
                {"revision": "abc", "local_files_only": True},
            ),
            ("microsoft/STELLAR", file, {}),
        ]

    def test_an_existing_path_wins(self, hub: FakeHub, tmp_path: Path) -> None:
        model = Stellar(**reference.model_arguments())
        model.save_pretrained(tmp_path / "stellar-b16")
        assert Stellar.from_pretrained("stellar-b16").config == model.config
        assert hub.asked == []

    @pytest.mark.parametrize("variant", [None, "b12"])
    def test_unknown_variant(self, hub: FakeHub, variant: str | None) -> None:
        with pytest.raises(ValueError, match=rf"one of .*'h16'.*got {variant!r}"):
            Stellar.from_pretrained("microsoft/STELLAR", variant=variant)

    def test_offline(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*_: Any, **__: Any) -> str:
            raise LocalEntryNotFoundError("no connection")

        monkeypatch.setattr(files, "hf_hub_download", offline)
        with pytest.raises(FileNotFoundError, match=r"no connection.*give its path"):
            Stellar.from_pretrained("stellar-b16")


class TestRepository:
    def test_own_model_with_heads(self, hub: FakeHub) -> None:
        model = Stellar(**reference.model_arguments())
        model.save_pretrained(hub.folder)
        assert Stellar.from_pretrained("me/mine").config == model.config
        names = [name for _, name, _ in hub.asked]
        assert names == ["model.safetensors", "config.json", "heads.safetensors"]

    def test_variant(self, hub: FakeHub) -> None:
        save_file(reference.weights(), hub.folder / "model.ema.safetensors")
        checkpoint = read_checkpoint("me/mine", variant="ema")
        assert checkpoint.path.name == "model.ema.safetensors"

    def test_nothing_there(self, hub: FakeHub) -> None:
        with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin not found"):
            Stellar.from_pretrained("me/mine")

    @pytest.mark.parametrize("name", ["nothing", "a/b/c", "weights.safetensors"])
    def test_no_name(self, hub: FakeHub, name: str) -> None:
        with pytest.raises(FileNotFoundError, match="neither a folder or weight file"):
            read_checkpoint(name)
