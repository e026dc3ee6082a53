"""Verbs in files of their own, which are imported when somebody asks for them."""

from __future__ import annotations

import importlib

import click


class LazyGroup(click.Group):
    """A group with further verbs: ``elsewhere`` names modules of this package, each with a ``command``."""

    elsewhere: tuple[str, ...] = ()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self.elsewhere]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.elsewhere:
            return importlib.import_module(f"veneer.cli.{cmd_name}").command
        return super().get_command(ctx, cmd_name)
