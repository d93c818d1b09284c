# This example requires the following dependencies:
#   pip install "stellar-plugin"
#
# Sixteen tokens and where they are, as a prefix of a language model's input. It shows
# shapes and gradients on a transformer with random weights; it claims no quality.
#
# Run it with `python stellar.py`, or `python stellar.py runs/my_run/model`.

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from stellar_plugin import Stellar
from stellar_plugin.visual_tokens import VisualTokens


class Connector(nn.Module):
    """Maps visual tokens to where a language model has its words.

    Args:
        embed_dim: Numbers of a visual token.
        language_dim: Numbers of an embedded word.
    """

    def __init__(self, embed_dim: int, language_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.what = nn.Linear(embed_dim, language_dim)
        self.where = nn.Linear(5, language_dim)  # mass, x0, y0, x1, y1
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(language_dim, language_dim))

    def forward(self, visual: VisualTokens) -> Tensor:
        """Returns a prefix with shape (batch_size, num_queries, language_dim)."""
        what = self.what(self.norm(visual.tokens))
        return self.mlp(what + self.where(visual.geometry))


def main(checkpoint: str | None = None) -> None:
    """Sends two images and a sentence through a connector and a small transformer."""
    torch.manual_seed(0)
    if checkpoint is None:
        model = Stellar("stellar_vit_tiny_patch16_224", decoder_dim=64, decoder_depth=1)
    else:
        model = Stellar.from_pretrained(checkpoint)
    model.eval()
    language_dim, num_words = 96, 1000
    words = nn.Embedding(num_words, language_dim)
    layer = nn.TransformerEncoderLayer(language_dim, 4, 192, 0.0, batch_first=True)
    connector = Connector(model.encoder.embed_dim, language_dim)

    images = torch.rand(2, 3, 224, 224)
    sentences = torch.randint(num_words, (2, 12))
    visual = model.visual_tokens(images)
    prefix = connector(visual)
    print(
        f"tokens {tuple(visual.tokens.shape)}, geometry {tuple(visual.geometry.shape)}"
    )
    print(f"prefix of the sentence: {tuple(prefix.shape)}")

    output = layer(torch.cat([prefix, words(sentences)], dim=1))
    logits = output[:, prefix.shape[1] :] @ words.weight.mT
    loss = nn.functional.cross_entropy(logits[:, :-1].mT, sentences[:, 1:])
    loss.backward()
    for name, part in {"connector": connector, "encoder": model.encoder}.items():
        squares = [
            p.grad.square().sum() for p in part.parameters() if p.grad is not None
        ]
        print(f"gradient of the {name}: {torch.stack(squares).sum().sqrt():.3g}")

    with torch.no_grad():  # an image has its tokens, whatever it shares a batch with
        turned = connector(model.visual_tokens(images.flip(0))).flip(0)
    print(f"largest change in another order: {(turned - prefix).abs().max():.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
