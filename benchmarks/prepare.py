"""Whether decoding hides behind the accelerator's work in `prophy_jax.prepare`.

    python benchmarks/prepare.py --source=WISA_DIR [--encode=0.5] [--clips=60]

Decodes clips of the source at 81 frames of 480x832 as the command does, over and over to `clips` of them, for
an accelerator that takes `encode` seconds a clip and no processor time. Prints the time of decoding alone, of
the accelerator alone, and of both at once. The last should be the longer of the two, plus the start: the
first few clips are decoded at the same time, before the first is ready.
"""

import argparse
import itertools
import time
from types import SimpleNamespace

from prophy_jax.data import recording
from prophy_jax.data.sources import source as sources
from prophy_jax.data.sources.video import Bucket

DATA = SimpleNamespace(fps=16, max_upscale=1.25)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="as of prophy_jax.prepare")
    parser.add_argument("--encode", type=float, default=0.5, help="seconds a clip")
    parser.add_argument("--clips", type=int, default=60)
    options = parser.parse_args()
    source = sources.read_sources(options.source)
    clips = list(itertools.islice(itertools.cycle(source.clips), options.clips))

    def run(decode: bool, encode: float) -> float:
        begin = time.perf_counter()
        decoded = recording.decode_ahead(source, clips, [Bucket(81, 480, 832)], DATA, devices=1)
        for _ in decoded if decode else clips:
            time.sleep(encode)
        return time.perf_counter() - begin

    run(True, 0)  # the files into the page cache
    decoding, encoding = run(True, 0), run(False, options.encode)
    both = run(True, options.encode)
    print(f"decoding alone   {decoding:6.2f} s, {decoding / options.clips:.3f} s a clip")
    print(f"encoding alone   {encoding:6.2f} s, {encoding / options.clips:.3f} s a clip")
    print(f"both             {both:6.2f} s, {both / max(decoding, encoding):.2f} of the longer, "
          f"{both / (decoding + encoding):.2f} of the sum")  # fmt: skip


if __name__ == "__main__":
    main()
