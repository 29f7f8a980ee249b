"""What `nercc` takes, for the pages that tell of it."""

from conftest import require


def options_of(command: str) -> set[str]:
    """Of one of our commands, by its help's own list."""
    import typer

    from nercc_jax.cli._app import app

    if command == "serve":
        require("kserve", "serve")
        from nercc_jax.cli._serve import command_with_options

        parameters = command_with_options().params
    else:
        parameters = typer.main.get_command(app).commands[command].params
    return {name for each in parameters for name in each.opts}
