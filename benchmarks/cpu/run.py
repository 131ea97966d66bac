"""Everything of benchmarks/cpu, one after the other: `make bench-cpu`.

    python benchmarks/cpu/run.py [--quick] [--resume] [--require-path fused] [--strict]

Ends with the table of claims and docs/cpu.png. Goes on after a script that failed and then exits 1;
arguments of `protocol.parser` reach every script.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import protocol

SCRIPTS = (
    "correct",
    "train",
    "head",
    "optimizer",
    "decode",
    "load",
    "ceilings",
    "caps",
    "claims",
    "picture",
)


def main() -> None:
    parser = protocol.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--require-path", help="of train.py")
    parser.add_argument("--require-engine", help="of decode.py")
    parser.add_argument("--strict", action="store_true", help="of claims.py")
    parser.add_argument("--scripts", nargs="*", choices=SCRIPTS, default=SCRIPTS)
    options = parser.parse_args()
    shared = forwarded(options)
    failed = []
    for name in options.scripts:
        special = {
            "train": ["--require-path", options.require_path] if options.require_path else [],
            "decode": ["--require-engine", options.require_engine]
            if options.require_engine
            else [],
            "claims": ["--strict"] if options.strict else [],
        }
        command = [sys.executable, str(protocol.HERE / f"{name}.py"), *shared]
        began = time.perf_counter()
        protocol.say(f"== {name}")
        done = subprocess.run([*command, *special.get(name, [])], env=os.environ, check=False)
        protocol.say(f"== {name}: {(time.perf_counter() - began) / 60:.1f} min")
        if done.returncode != 0:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def forwarded(options: object) -> list[str]:
    """The shared arguments as they were given."""
    given = {key.replace("_", "-"): value for key, value in vars(options).items()}
    own = ("require-path", "require-engine", "strict", "scripts", "default-rounds", "child", "only")
    found: list[str] = []
    for key, value in given.items():
        if key in own or value is None or value is False or value == "":
            continue
        found += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return found


if __name__ == "__main__":
    main()
