"""The GPU itself: which one, its memory, streams and captured graphs, through cuda-python."""
