"""What `fit --alpha 0.6 --baselines` does, as a short PyTorch script: the opponent in fit.py."""

import json
import random
import sys

import h5py
import torch
from torch.nn.functional import cross_entropy, normalize
from torch_opponents import adapter, rate_factor

SHOTS, EPOCHS, BATCH, ALPHA = 16, 200, 256, 0.6


def draw(labels: torch.Tensor, shots: int, rng: random.Random) -> list[int]:
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(row)
    return [row for rows in groups.values() for row in rng.sample(rows, shots)]


def main() -> None:
    # As JAX does; denormal moments slow AdamW down late in a run.
    torch.set_flush_denormal(True)
    with h5py.File(sys.argv[1]) as file:
        splits = {
            name: (
                torch.from_numpy(file[f"images/{name}/features"][0]),
                torch.from_numpy(file[f"images/{name}/labels"][...]).long(),
            )
            for name in ("train", "val", "test")
        }
        text = torch.from_numpy(file["text/features"][...])
        scale = json.loads(file["metadata"][...].tobytes())["logit_scale"]
    weights = normalize(normalize(text, dim=-1).mean(1), dim=-1)
    rng = random.Random(1)
    support = draw(splits["train"][1], SHOTS, rng)
    chosen = draw(splits["val"][1], 4, rng)
    features, labels = (part[support] for part in splits["train"])
    val_features, val_labels = (part[chosen] for part in splits["val"])
    torch.manual_seed(1)
    model = adapter(features.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2, fused=True)
    total = EPOCHS * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, total))

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return scale * normalize(ALPHA * model(rows) + (1 - ALPHA) * rows, dim=-1) @ weights.T

    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = cross_entropy(logits(features[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()

    def accuracy(rows: torch.Tensor, own: torch.Tensor) -> float:
        with torch.inference_mode():
            return (logits(rows).argmax(1) == own).float().mean().item()

    print(f"validation accuracy {accuracy(val_features, val_labels):.4f}")
    print(f"test accuracy {accuracy(*splits['test']):.4f}")


if __name__ == "__main__":
    main()
