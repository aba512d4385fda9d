#!/usr/bin/env python3
"""Train, for launchers that start a script and not a module (`deepspeed --launcher mpich`); see
`megam3.train`."""

import runpy

if __name__ == "__main__":
    # as `python -m megam3.train`: signals are remembered from before the heavy imports
    runpy.run_module("megam3.train", run_name="__main__", alter_sys=True)
