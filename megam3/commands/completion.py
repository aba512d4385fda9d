"""Completion for a shell: subcommands, their options, and the fields of a recipe.

    megam3 completion bash > ~/.local/share/bash-completion/completions/megam3
    source <(megam3 completion bash)                                              in this shell alone
    megam3 completion zsh > ~/.megam3.zsh           and in ~/.zshrc, after compinit: source ~/.megam3.zsh

The script is printed once and asks megam3 nothing, so that a key press costs no import.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from megam3.cli import SUBCOMMANDS, load
from megam3.config.explain import all_fields
from megam3.config.load import recipe_names
from megam3.obs.figures import FIGURES

SHELLS = ("bash", "zsh")
PASSED_ON = ("quickstart",)
"""Subcommands that read no word themselves: a script of the checkout gets them."""

_SCRIPT = r"""__HEAD__# megam3 completion, made by `megam3 completion __SHELL__`
_megam3() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev= name=${COMP_WORDS[1]}
  ((COMP_CWORD > 0)) && prev=${COMP_WORDS[COMP_CWORD-1]}
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "__NAMES__ --help --version" -- "$cur"))
    return
  fi
  local options= values= fixed= words= takes=
  case $name in
__CASES__
    *) return ;;
  esac
  case "$name $prev" in
__CHOICES__
  esac
  if [[ -n $values ]]; then
    COMPREPLY=($(compgen -W "$values" -- "$cur"))
  elif [[ $cur == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$cur"))
  elif [[ $prev == -* && " $takes " == *" $prev "* ]]; then
    COMPREPLY=($(compgen -f -- "$cur"))
  elif [[ -n $fixed ]]; then
    COMPREPLY=($(compgen -W "$fixed" -- "$cur"))
  else
    case $words in
      recipe)
        if ((COMP_CWORD == 2)); then
          COMPREPLY=($(compgen -W "__RECIPES__" -- "$cur") $(compgen -f -- "$cur"))
        elif [[ $cur != = && $prev != = ]]; then
          compopt -o nospace 2>/dev/null
          COMPREPLY=($(compgen -S = -W "__FIELDS__" -- "$cur"))
        else
          COMPREPLY=($(compgen -f -- "${cur#=}"))
        fi ;;
      names) COMPREPLY=($(compgen -W "__EXPLAINED__" -- "$cur")) ;;
      *) COMPREPLY=($(compgen -f -- "$cur")) ;;
    esac
  fi
}
complete -o filenames -F _megam3 megam3
"""
_ZSH_HEAD = "#compdef megam3\nautoload -U +X bashcompinit && bashcompinit\n"


class _ReachedError(Exception):
    """A subcommand is about to read its words with `parser`."""

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__(parser.prog)
        self.parser = parser


def main(argv: Sequence[str]) -> int:
    """Print the script of a shell."""
    parser = argparse.ArgumentParser(
        prog="megam3 completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=SHELLS)
    print(script(parser.parse_args(argv).shell), end="")
    return 0


def script(shell: str) -> str:
    """The completion script for `shell`."""
    parsers = {name: parser_of(name) for name in SUBCOMMANDS if name not in PASSED_ON}
    cases = [f"    {name}) {_facts(name, parser)} ;;" for name, parser in parsers.items()]
    choices = [line for name, parser in parsers.items() for line in _choice_lines(name, parser)]
    filled: Mapping[str, str] = {
        "SHELL": shell,
        "HEAD": _ZSH_HEAD if shell == "zsh" else "",
        "NAMES": " ".join(SUBCOMMANDS),
        "CASES": "\n".join(cases),
        "CHOICES": "\n".join(choices),
        "RECIPES": " ".join(recipe_names()),
        "FIELDS": " ".join(all_fields()),
        "EXPLAINED": " ".join([*all_fields(), "figures", *(name for name in FIGURES if "*" not in name)]),
    }
    text = _SCRIPT
    for name, value in filled.items():
        text = text.replace(f"__{name}__", value)
    return text


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a subcommand makes when it is called. It is called with --help and stopped where it
    begins to read, so nothing else of it runs."""

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _ReachedError(parser)

    call, before = load(name), argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = stop  # type: ignore[assignment,method-assign]
    try:
        call(["--help"])
    except _ReachedError as found:
        return found.parser
    finally:
        argparse.ArgumentParser.parse_known_args = before  # type: ignore[method-assign]
    raise AssertionError(f"megam3 {name} reads no command line")


def _facts(name: str, parser: argparse.ArgumentParser) -> str:
    """Shell assignments: its options, those that take a word, and what its other words are."""
    options = [word for action in parser._actions for word in action.option_strings]
    takes = [word for action in parser._actions if action.nargs != 0 for word in action.option_strings]
    first = next((action.dest for action in parser._actions if not action.option_strings), "")
    words = "names" if name == "explain" else "recipe" if first == "recipe" else "files"
    fixed = " ".join(
        str(choice)
        for action in parser._actions
        if not action.option_strings
        for choice in action.choices or ()
    )
    return (
        f"options={shlex.quote(' '.join(options))} takes={shlex.quote(' '.join(takes))}"
        f" words={words} fixed={shlex.quote(fixed)}"
    )


def _choice_lines(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """A line for each option with a fixed set of values."""
    return [
        f"    {shlex.quote(f'{name} {word}')}) values={shlex.quote(' '.join(map(str, action.choices)))} ;;"
        for action in parser._actions
        if action.choices is not None
        for word in action.option_strings
    ]
