"""Columns of a store's metadata that it writes, or adds when it is read; all others come from its inputs."""

SAMPLES = "num_samples"
FRAME_COLUMNS = ("num_frames", "frame_start", "frame_offset_ms", "frame_hop_ms")  # with timestamps
STATE_COLUMNS = ("states_start", "states_size")  # with hidden states
STATE_FRAMES = "state_frames."  # and a member's name: with frames of hidden states
READ_COLUMNS = ("shard", "row")  # where a clip is stored: EmbeddingStore adds them

STORE_COLUMNS = (SAMPLES, *FRAME_COLUMNS, *STATE_COLUMNS, *READ_COLUMNS)


def is_written(column: str) -> bool:
    """Whether a store writes a column of this name, or adds it when it is read."""
    return column in STORE_COLUMNS or column.startswith(STATE_FRAMES)
