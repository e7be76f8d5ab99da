"""Snakemake that asks Slurm for the state of its jobs each second: its own pauses grow by ten seconds a time."""

import asyncio

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor


async def _sleep(_: RemoteExecutor) -> None:
    await asyncio.sleep(1)


RemoteExecutor.sleep = _sleep
main()
