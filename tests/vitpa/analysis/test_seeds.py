"""Statistics of a sweep's structure over seeds: the last row of a cell is the end of the training."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vitpa.analysis.command import SweepStructure
from vitpa.analysis.seeds import differences, over_seeds
from vitpa.trained import TrainedSweep

END = 6.0


def found(epochs: dict[tuple[str, int], list[float]]) -> pd.DataFrame:
    """What `findings` has of runs of both attentions, measured after these epochs: the value is epoch + seed / 10."""
    return pd.DataFrame(
        [
            {
                **{"setting": "digits", "attention": attention, "seed": seed, "cell": f"digits {attention}", "epoch": epoch},
                **{"measure": measure, "layer": layer, "head": None, "value": epoch + seed / 10, "initial": 0.0},
                **{"chance": 0.1, "chance_low": 0.0, "chance_high": 0.2},
            }
            for (attention, seed), its in epochs.items()
            for epoch in its
            for measure, layers in (("similarity_recall", [None]), ("attention_recall", [None, 0, 1]))
            for layer in layers
        ]
    )


def test_epochs_ascend_where_seeds_were_measured_after_others() -> None:
    epochs = {
        ("positional", 0): [0, END],
        ("positional", 1): [0, 2, 4, END],
        ("content", 1): [0, 4, END],
        ("content", 0): [0, END],
    }
    frame = found(epochs)
    cells, paired = over_seeds(frame), differences(frame)
    for (cell, _, _), rows in cells.groupby(["cell", "measure", cells["layer"].fillna(-1)]):
        assert rows["epoch"].tolist() == ([0, 2, 4, END] if cell == "digits positional" else [0, 4, END])
        assert rows["n"].tolist() == ([2, 1, 1, 2] if cell == "digits positional" else [2, 1, 2])
    assert cells["cell"].drop_duplicates().tolist() == ["digits positional", "digits content"]  # in the sweep's order
    for _, rows in paired.groupby(["measure", paired["layer"].fillna(-1)]):
        assert rows["epoch"].tolist() == [0, 4, END]
        assert rows["n"].tolist() == [2, 1, 2]
    table = SweepStructure(TrainedSweep(Path("sw"), [], []), [], {}, cells, paired, []).table()
    assert table.count("6.050 ± 0.071") == 4  # two cells, two measures, over both seeds at the end
    assert "(1 seed)" not in table


def test_attentions_that_share_no_seed_have_no_differences() -> None:
    frame = found({("positional", 0): [0, END], ("content", 1): [0, END]})
    assert differences(frame).empty
    table = SweepStructure(TrainedSweep(Path("sw"), [], []), [], {}, over_seeds(frame), differences(frame), []).table()
    assert "content - positional" not in table
