from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import _CACHED_NO_EXIST
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file

from stellar_plugin import Stellar
from stellar_plugin.checkpoints import CONFIG_NAME, files, read_checkpoint
from tests import reference
from tests.checkpoint_files import save, timm_vit

HEAD_COUNTS = {"num_heads": 3, "decoder_num_heads": 4}


class FakeHub:
    """A hub whose files lie in a folder; remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.errors: dict[str, Exception] = {}

    def download(self, repo: str, name: str, **kwargs: Any) -> str:
        self.asked.append((repo, name, kwargs))
        if name in self.errors:
            raise self.errors[name]
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

    @pytest.mark.parametrize("name", ["config.json", "heads.safetensors"])
    def test_a_lost_connection_is_no_absent_file(
        self, hub: FakeHub, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Stellar(**reference.model_arguments()).save_pretrained(hub.folder)
        hub.errors[name] = LocalEntryNotFoundError("no connection")
        with pytest.raises(FileNotFoundError, match=r"no connection.*a connection"):
            read_checkpoint("me/mine")
        # Unless the hub said so when there was a connection.
        known = {("me/mine", name): _CACHED_NO_EXIST}
        monkeypatch.setattr(
            files, "try_to_load_from_cache", lambda *key, **_: known.get(key)
        )
        assert read_checkpoint("me/mine").heads == {}

    def test_heads_only_of_our_models(self, hub: FakeHub) -> None:
        save(timm_vit().state_dict(), hub.folder / "model.safetensors")
        read_checkpoint("timm/vit")
        assert [name for _, name, _ in hub.asked] == ["model.safetensors", CONFIG_NAME]

    @pytest.mark.parametrize(
        ("kind", "status", "pattern"),
        [
            (GatedRepoError, 403, "'me/mine' is gated: accept its terms at https://hu"),
            (RepositoryNotFoundError, 401, "no https://.*/me/mine, or it is private"),
            (HfHubHTTPError, 429, r"refused \(429\): try again later"),
            (TimeoutError, None, "try again with a connection"),
        ],
    )
    @pytest.mark.parametrize("name", ["model.safetensors", CONFIG_NAME])
    def test_refused(
        self, hub: FakeHub, kind: Any, status: int | None, pattern: str, name: str
    ) -> None:
        save(timm_vit().state_dict(), hub.folder / "model.safetensors")
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        hub.errors[name] = (
            kind("no", response=response) if status else kind("timed out")
        )
        with pytest.raises(FileNotFoundError, match=f"{pattern}.*give its path"):
            read_checkpoint("me/mine")

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("nothing", ""),
            ("a/b/c", "There is no folder 'a/b' either."),
            ("weights.safetensors", ""),
            ("runs/stelar", "Did you mean 'runs/stellar'?"),
            ("./stelar", ""),
            ("~/stelar", "There is no folder '~' either."),
            ("me/iter_4.pth", "There is no folder 'me' either."),
        ],
    )
    def test_no_name(self, hub: FakeHub, name: str, hint: str) -> None:
        Path("runs/stellar").mkdir(parents=True)
        message = f"neither a folder or weight file.*{re.escape(hint)} Give a file"
        with pytest.raises(FileNotFoundError, match=message):
            read_checkpoint(name)
        assert hub.asked == []

    def test_dots_are_no_suffix(self, hub: FakeHub) -> None:
        save(timm_vit().state_dict(), hub.folder / "model.safetensors")
        read_checkpoint("timm/vit_base_patch16_224.mae")
        assert hub.asked[0][:2] == (
            "timm/vit_base_patch16_224.mae",
            "model.safetensors",
        )


class TestTimm:
    def test_offline__one_question(
        self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "try_to_load_from_cache", lambda *_: None)
        hub.errors["model.safetensors"] = LocalEntryNotFoundError("no connection")
        with pytest.raises(FileNotFoundError, match=r"no connection.*a connection"):
            read_checkpoint("timm:vit_small_patch8_224")
        assert hub.asked == [
            ("timm/vit_small_patch8_224.dino", "model.safetensors", {})
        ]
