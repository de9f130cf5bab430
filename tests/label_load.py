"""Send good and bad requests to the app for MONAI Label, from several clients at once, for minutes.

    PYTHONPATH=. python tests/label_load.py 300 8    # seconds, clients

It needs MONAI Label (docs/label.md). Every answer must be a result, or an error that says why, and after the first
minute the memory of the server must not grow. Exits with 1 otherwise. Parameters that are not JSON are left out: MONAI
Label itself answers them with status 500, before it asks the app.
"""

import json
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import requests
from conftest import brain
from test_label import CONF, place, serving

from voxelmorph_monai.cli import main as vxm
from voxelmorph_monai.io.images import save_image

GOOD = "register", {"moving": "a"}
BAD = [
    ("register", {"moving": "nobody"}),
    ("register", {"moving": "../../etc/passwd"}),
    ("register", {"moving": "a", "similarity": "telepathy"}),
    ("register", {"moving": "a", "budget": "soon"}),
    ("register", {}),
    ("nothing", {"moving": "a"}),
]


def request(url: str, rng: random.Random) -> tuple[int, str]:
    """One request, good or bad: its status, and what it says."""
    kind = rng.random()
    if kind < 0.1:
        answer = requests.get(f"{url}/info/", timeout=600)
    elif kind < 0.2:
        answer = requests.post(f"{url}/infer/register", params={"image": "b"}, data="no form", timeout=600)
    else:
        model, params = GOOD if kind < 0.6 else rng.choice(BAD)
        image = "b" if kind < 0.9 else "a study that is not there"
        files = {"params": (None, json.dumps(params))}
        answer = requests.post(
            f"{url}/infer/{model}", params={"image": image, "output": "image"}, files=files, timeout=600
        )
    return answer.status_code, "" if answer.ok else answer.text[:300]


def memory(url: str) -> float:
    """MiB of the server and all that it started."""
    port = url.rpartition(":")[2]
    mine = [p for p in psutil.process_iter(["cmdline"]) if port in (p.info["cmdline"] or [])]
    every = {p for each in mine for p in [each, *each.children(recursive=True)]}
    return sum(p.memory_info().rss for p in every if p.is_running()) / 2**20


def main(seconds: float, clients: int) -> int:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "studies").mkdir()
        for study, seed in (("a", 1), ("b", 3)):
            save_image(folder / "studies" / f"{study}.nii.gz", brain(seed)[0], place())
        assert vxm(["label-app", str(folder / "app")]) == 0
        with serving(folder, folder / "app", folder / "studies", CONF) as url:
            end, counts, odd, sizes = time.monotonic() + seconds, Counter[int](), [], []

            def ask(client: int) -> None:
                rng = random.Random(client)
                while time.monotonic() < end:
                    status, text = request(url, rng)
                    counts[status] += 1
                    if status >= 500 and "detail" not in text:
                        odd.append(f"{status}: {text!r}")

            with ThreadPoolExecutor(clients) as pool:
                running = [pool.submit(ask, client) for client in range(clients)]
                while time.monotonic() < end:
                    time.sleep(min(10.0, seconds / 10))
                    sizes.append(memory(url))
                for each in running:
                    each.result()
            print(f"answers: {dict(sorted(counts.items()))}; MiB: {[round(size) for size in sizes]}")
            print("\n".join(sorted(set(odd))[:20]))
            later = sizes[len(sizes) // 5 :]
            grown = max(later[len(later) // 2 :]) > 1.15 * max(later[: len(later) // 2])
            return int(bool(odd) or grown)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2])))
