"""Window, sinks and retained pairs, no memory: the control without pairs, the pairs-only variant with."""

from replace.mixer import VARIANTS, BlockMixer


@VARIANTS.register("sliding_window")
class SlidingWindow(BlockMixer):
    """Softmax over the exact part.

    An untrained swap is near the teacher on text and has no recall beyond what is retained.
    """
