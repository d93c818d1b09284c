"""The page of recipes says what each changes."""

from __future__ import annotations

from pathlib import Path

from _ext import recipes

from lightly_ext.pretrain.recipes import recipe_names

RECIPE = """\
# A recipe of two
# lines.
#   stellar pretrain --config it
model:
  lr: 1.5e-4 # of the paper
  betas: [0.9, 0.95]
  head: {}
"""


class TestRecipes:
    def test_values_of(self, tmp_path: Path) -> None:
        path = tmp_path / "it.yaml"
        path.write_text(RECIPE)

        assert recipes.values_of(path) == {
            "model.lr": ("1.5e-4", "of the paper"),
            "model.betas": ("[0.9, 0.95]", ""),
            "model.head": ("{}", ""),
        }

    def test_comment_of(self, tmp_path: Path) -> None:
        path = tmp_path / "it.yaml"
        path.write_text(RECIPE)

        assert recipes.comment_of(path) == (
            "A recipe of two lines.\n\n```bash\nstellar pretrain --config it\n```\n"
        )

    def test_recipes_page(self) -> None:
        page = recipes.recipes_page()

        headings = [line[3:] for line in page.splitlines() if line.startswith("## ")]
        assert headings == ["base", "base_mae", *recipe_names()]
        text = page.partition("## vit_huge\n")[2].partition("\n## ")[0]
        assert "| `trainer.max_epochs` | `150` | `50` | paper |" in text
        assert "| `model.grad_checkpointing` |  | `true` |  |" in text
