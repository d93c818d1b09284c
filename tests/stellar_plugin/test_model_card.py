"""Model cards, and what is uploaded to the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin
from safetensors.torch import save_file

from stellar_plugin import Stellar
from stellar_plugin.checkpoints import read_checkpoint, save_encoder
from stellar_plugin.hashes import file_sha256
from stellar_plugin.provenance import inherited_license, origin
from tests import reference
from tests.checkpoint_files import timm_vit

HEADS = {
    "sparse_head": {"mlp.weight": torch.arange(6.0).view(2, 3)},
    "cls_head": {"mlp.weight": torch.ones(2, 2)},
}
PRIOR = {
    "source": "checkpoints/mae_pretrain_vit_base.pth",
    "read_as": "MAE in layout 'timm'",
    "license": "CC BY-NC 4.0",
}
RUN = {
    "method": "stellar",
    "settings": {"lr": 0.001},
    "commands": ["stellar pretrain --config photos --data.path /home/me/birds"],
    "data": {"path": "/home/me/birds", "images": 300, "digest": "ab" * 32},
    "step": 12,
    "total_steps": 12,
    "images_seen": 520,
    "seconds": 7200.0,
    "derived": {"data.batch_size": "64: 64 on a CPU"},
    "global_batch": 64,
    "device": "1 x cpu (x86_64)",
    "precision": "32-true",
    "versions": {"torch": "2.14.1"},
    "revision": None,
}


def trained(folder: Path, **facts: Any) -> Stellar:
    """A model as a run exports it."""
    model = reference.stellar()
    model.heads, model.provenance = HEADS, {**RUN, **facts}
    model.save_pretrained(folder)
    return model


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def store_result(folder: Path, sha256: str, accuracy: float) -> None:
    folder.mkdir(parents=True)
    result = {
        "task": "knn",
        "model": "birds",
        "data": "CUB | small",
        "scores": {"accuracy": accuracy, "num_test": 100},
        "protocol": {"name": "knn", "neighbours": 20},
        "provenance": {"sha256": sha256, "command": "stellar evaluate knn --data CUB"},
        "identity": {"model": {"sha256": sha256}},
        "chance": {"accuracy": 0.05},
        "untrained": {"accuracy": 0.12},
    }
    (folder / "result.json").write_text(json.dumps(result))


class FakeApi:
    """The hub at the border of huggingface_hub: keeps what is uploaded."""

    def __init__(self, uploaded: Path) -> None:
        self.uploaded = uploaded

    def __call__(self, token: str | None = None) -> FakeApi:
        return self

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, self.uploaded / repo_id)
        return f"commit of {repo_id}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(hub_mixin, "HfApi", FakeApi(folder))
    return folder


class TestPushToHub:
    def test_push_to_hub__what_is_uploaded_is_the_model(
        self, tmp_path: Path, hub: Path
    ) -> None:
        trained(tmp_path / "run")
        model = Stellar.from_pretrained(tmp_path / "run")
        assert model.push_to_hub("me/birds") == "commit of me/birds"
        uploaded = hub / "me" / "birds"
        assert {path.name for path in uploaded.iterdir()} == {
            *("README.md", "config.json", "model.safetensors", "heads.safetensors"),
            *("provenance.json", "modeling_stellar.py", "preprocessor_config.json"),
        }
        again = Stellar.from_pretrained(uploaded)
        expected = reference.load("forward")
        images = reference.normalized(expected["image"])
        with torch.no_grad():
            sparse = again(images).sparse
        torch.testing.assert_close(sparse, expected["out.sparse"], rtol=0, atol=2e-5)
        assert again.config == model.config
        heads = read_checkpoint(uploaded).heads
        assert heads.keys() == HEADS.keys()
        for name, head in HEADS.items():
            assert torch.equal(heads[name]["mlp.weight"], head["mlp.weight"])
        # Nothing has become of the weights: the record is the run's.
        assert again.provenance == model.provenance
        assert again.provenance["commands"] == RUN["commands"]

    def test_push_to_hub__the_card_has_name_scores_and_licence(
        self, tmp_path: Path, hub: Path
    ) -> None:
        trained(tmp_path / "run")
        sha256 = file_sha256(tmp_path / "run" / "model.safetensors")
        store_result(tmp_path / "results" / "ours", sha256, 0.1425)
        store_result(tmp_path / "results" / "of_others", "f" * 64, 0.9999)
        model = Stellar.from_pretrained(tmp_path / "run")
        told = {"license": "cc-by-4.0", "results": tmp_path / "results"}
        model.push_to_hub("me/birds", model_card_kwargs=told)
        card = card_of(hub / "me" / "birds")
        assert card.data.license == "cc-by-4.0"
        (score,) = card.data.eval_results
        assert (score.metric_type, score.metric_value) == ("accuracy", 0.1425)
        assert score.dataset_name == "CUB | small"
        row = "| knn | CUB \\| small | accuracy | 0.1425 | 0.12 | 0.05 |"
        assert row in card.text
        assert "| neighbours | 20 |" in card.text and "0.9999" not in card.text
        assert 'Stellar.from_pretrained("me/birds")' in card.text
        assert 'AutoModel.from_pretrained("me/birds", trust' in card.text

    def test_push_to_hub__no_such_results(self, tmp_path: Path, hub: Path) -> None:
        model = trained(tmp_path / "run")
        told = {"results": tmp_path / "nowhere"}
        with pytest.raises(FileNotFoundError, match="no folder of results"):
            model.push_to_hub("me/birds", model_card_kwargs=told)
        assert not hub.exists()


class TestCard:
    def test_card__of_a_run(self, tmp_path: Path) -> None:
        trained(tmp_path)
        card = card_of(tmp_path)
        data = card.data.to_dict()
        assert data["license"] == "unknown" and data["library_name"] == "stellar-plugin"
        assert data["pipeline_tag"] == "image-feature-extraction"
        assert not data.keys() & {"base_model", "datasets", "model-index"}
        assert "300 images of `birds`; names and sizes: sha256 abababab" in card.text
        assert f"```bash\n{RUN['commands'][0]}\n```" in card.text
        assert "It started from random weights." in card.text
        assert "| time | 2.00 h |" in card.text
        assert "| revision of the code | not known |" in card.text
        assert "None are stored for these weights" in card.text
        assert "Of these weights: not stated by whoever trained them." in card.text
        assert "sparse_head, cls_head" in card.text
        assert "PytorchModelHubMixin" not in card.text

    @pytest.mark.parametrize(
        ("source", "base"),
        [
            ("timm:vit_base_patch16_224.mae", "timm/vit_base_patch16_224.mae"),
            ("stellar-b16", "microsoft/STELLAR"),
            ("facebook/vit-mae-base", "facebook/vit-mae-base"),
            ("checkpoints/mae.pth", None),
        ],
    )
    def test_card__base_model(
        self, tmp_path: Path, source: str, base: str | None
    ) -> None:
        trained(tmp_path, started_from={**PRIOR, "source": source})
        card = card_of(tmp_path)
        assert card.data.to_dict().get("base_model") == base
        assert card.data.license == "cc-by-nc-4.0"
        assert (
            f"They started from {source} (MAE in layout 'timm'), published under "
            in (card.text)
        )

    def test_card__licence_of_the_first_of_several(self, tmp_path: Path) -> None:
        before = {
            **RUN,
            "commands": ["stellar pretrain --first"],
            "started_from": PRIOR,
        }
        second = {"source": "runs/first/model", "read_as": "STELLAR", "license": ""}
        trained(tmp_path, started_from={**second, "provenance": before})
        card = card_of(tmp_path)
        assert card.data.license == "cc-by-nc-4.0"
        assert "```bash\nstellar pretrain --first\n```" in card.text
        assert f"It started from `{PRIOR['source']}`" in card.text

    def test_card__licence_that_the_hub_has_no_name_for(self, tmp_path: Path) -> None:
        terms = "DINOv3 License, https://ai.meta.com/license"
        trained(tmp_path, started_from={**PRIOR, "license": terms})
        data = card_of(tmp_path).data.to_dict()
        assert (data["license"], data["license_name"]) == ("other", "DINOv3 License")
        assert data["license_link"] == "https://ai.meta.com/license"

    @pytest.mark.parametrize(
        ("license", "name", "more"),
        [
            ("MIT", "mit", None),
            ("cc-by-4.0", "cc-by-4.0", None),
            ("our licence: ask", "other", "our licence: ask"),
        ],
    )
    def test_card__licence_that_is_given(
        self, tmp_path: Path, license: str, name: str, more: str | None
    ) -> None:
        card = trained(tmp_path).generate_model_card(license=license)
        data = card.data.to_dict()
        assert (data["license"], data.get("license_name")) == (name, more)
        assert f"Of these weights: {license}, as stated by" in card.text

    def test_card__home_folder_is_not_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        command = "stellar pretrain --data.path '/home/me/müll' /home/melanie/x"
        prior = {**PRIOR, "source": "/home/me/mae.pth"}
        trained(tmp_path, commands=[command], started_from=prior)
        shown = "stellar pretrain --data.path '~/müll' /home/melanie/x"
        assert shown in card_of(tmp_path).text
        record = (tmp_path / "provenance.json").read_text()
        assert "/home/me/" not in card_of(tmp_path).text + record
        assert json.loads(record)["data"]["path"] == "~/birds"
        assert json.loads(record)["started_from"]["source"] == "~/mae.pth"

    def test_card__text_that_is_no_markdown(self, tmp_path: Path) -> None:
        trained(
            tmp_path,
            commands=["stellar pretrain --data.path '```\n# no title'"],
            data={"path": "a/b`c\n- no item", "images": 1},
            started_from={**PRIOR, "source": "x\n- no item"},
        )
        text = card_of(tmp_path).text
        assert "````bash\nstellar pretrain --data.path '```\n# no title'\n````" in text
        assert "1 image of `` b`c - no item ``" in text
        assert "It started from `x - no item`" in text
        assert not any(line.startswith("- no item") for line in text.splitlines())

    def test_card__little_is_recorded(self, tmp_path: Path) -> None:
        model = reference.stellar()
        model.provenance = {"commands": ["stellar pretrain"], "data": {"path": "x"}}
        model.save_pretrained(tmp_path)
        text = card_of(tmp_path).text
        for name in ("steps", "time", "device", "precision", "versions"):
            assert f"| {name} | not known |" in text
        assert "| images | not recorded |" in text

    def test_card__minutes_of_a_short_run(self, tmp_path: Path) -> None:
        trained(tmp_path, seconds=90.0)
        assert "| time | 1.5 min |" in card_of(tmp_path).text

    def test_card__a_folder_that_is_gone_is_not_at_the_hub(
        self, tmp_path: Path
    ) -> None:
        trained(tmp_path, started_from={**PRIOR, "source": "me/a", "is_local": True})
        assert card_of(tmp_path).data.to_dict().get("base_model") is None

    @pytest.mark.parametrize(
        "damage",
        [{"scores": None}, {"protocol": "knn"}, {"task": None}, {"provenance": []}],
    )
    def test_card__damaged_result(self, tmp_path: Path, damage: dict[str, Any]) -> None:
        model = trained(tmp_path / "run")
        sha256 = file_sha256(tmp_path / "run" / "model.safetensors")
        store_result(tmp_path / "results", sha256, 0.5)
        path = tmp_path / "results" / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
        with pytest.raises(ValueError, match=r"result\.json' is no stored"):
            model.generate_model_card(results=tmp_path / "results")

    def test_save_pretrained__own_text_of_another_encoding(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "README.md").write_bytes("müll".encode("latin-1"))
        trained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == b"m\xfcll"

    def test_card__data_of_the_hub(self, tmp_path: Path) -> None:
        trained(tmp_path, data={"path": "hf:me/birds:train", "images": 9})
        assert card_of(tmp_path).data.datasets == ["me/birds"]

    def test_card__nothing_recorded(self, tmp_path: Path) -> None:
        reference.stellar().save_pretrained(tmp_path)
        text = card_of(tmp_path).text
        assert "What was done to these weights is not recorded." in text
        assert "random weights" not in text
        assert "which they were is not recorded" in text

    def test_card__changed_weights_say_so(self, tmp_path: Path) -> None:
        trained(tmp_path / "run", started_from=PRIOR)
        sha256 = file_sha256(tmp_path / "run" / "model.safetensors")
        model = Stellar.from_pretrained(tmp_path / "run")
        with torch.no_grad():
            model.encoder.vit.norm.weight.mul_(2)
        model.save_pretrained(tmp_path / "tuned")
        card = card_of(tmp_path / "tuned")
        assert "What was done to these weights is not recorded." in card.text
        assert f"It started from `weights with sha256 {sha256}`" in card.text
        assert "which was trained on 300 images of `birds`" in card.text
        assert card.data.license == "cc-by-nc-4.0"

    def test_save_pretrained__own_text_stays_and_a_card_is_renewed(
        self, tmp_path: Path
    ) -> None:
        model = trained(tmp_path)
        model.provenance = {**RUN, "step": 99}
        model.save_pretrained(tmp_path)
        assert "| steps | 99 of 12 |" in card_of(tmp_path).text
        (tmp_path / "README.md").write_text("My birds.")
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "My birds."


class TestOrigin:
    def test_origin__published_weights_have_their_licence(self, tmp_path: Path) -> None:
        state = {f"decoder_{i}": torch.ones(1) for i in range(2)}
        path = tmp_path / "mae_pretrain_vit_base.pth"
        torch.save({"model": {**timm_vit().state_dict(), **state}}, path)
        checkpoint = read_checkpoint(path)
        told = origin(checkpoint, path)
        assert checkpoint.method is not None and told["license"]
        assert told["license"] == checkpoint.method.license

    def test_origin__ones_own_mae_has_none_of_its_authors(self, tmp_path: Path) -> None:
        encoder = reference.stellar().encoder
        config = {
            k: v
            for k, v in reference.stellar().config.items()
            if k
            in (
                "model_name",
                "norm_eps",
                "pos_antialias",
                "mean",
                "std",
                "img_size",
                "embed_dim",
                "depth",
                "num_heads",
                "mlp_ratio",
            )
        }
        save_encoder(encoder, config, "MAE", tmp_path)
        (tmp_path / "provenance.json").write_text(json.dumps(RUN))
        checkpoint = read_checkpoint(tmp_path)
        assert checkpoint.method is not None and checkpoint.method.license
        told = origin(checkpoint, tmp_path)
        assert told["license"] == "" and told["provenance"] == RUN
        assert inherited_license({"started_from": told}) == ("", "")

    def test_loaded__official_weights(self, tmp_path: Path) -> None:
        save_file(reference.weights(), tmp_path / "stellar-b16.safetensors")
        model = Stellar.from_pretrained(
            tmp_path / "stellar-b16.safetensors", num_heads=3, decoder_num_heads=4
        )
        assert model.provenance["started_from"]["license"] == ""
        model.save_pretrained(tmp_path / "ours")
        text = card_of(tmp_path / "ours").text
        assert "licence of the weights that they started from is not known" in text
