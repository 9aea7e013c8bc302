"""Settings in groups: a method may take a frozen dataclass, whose fields are settings by themselves, too.

`unisd(agreement=Agreement(gamma=0.1))` and `retort.load("unisd", gamma=0.1)` say the same. A group is any parameter of
a method whose default is a dataclass. A field is the setting of its own name, or of the one that its metadata say
(`field(default=None, metadata={"setting": "update_rate"})`). What is stored, shown and checked are single settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter, Signature
from typing import Any, cast, get_type_hints

from retort.errors import UserError, did_you_mean, quoted


@dataclass(frozen=True)
class Groups:
    """The groups of settings of a method.

    Attributes:
        build: The function that makes the method from groups.
        defaults: Each group with its defaults, by the name of the parameter.
    """

    build: Callable[..., Any]
    defaults: Mapping[str, Any]

    @staticmethod
    def of(build: Callable[..., Any]) -> Groups:
        """Those of a function.

        Raises:
            TypeError: Two settings of one name.
        """
        parameters = inspect.signature(build).parameters
        found = Groups(build, {name: one.default for name, one in parameters.items() if is_dataclass(one.default)})
        names: list[str] = []
        for name in parameters:
            own = found.settings(name) if name in found.defaults else {}
            names += [*own, *([] if name in own else [name])]  # a group may be called like a setting of its own
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise TypeError(f"method {build.__name__} has two settings called {twice}; give one another name")
        return found

    def settings(self, group: str) -> dict[str, str]:
        """The settings of a group, each with the field that it is."""
        return {one.metadata.get("setting", one.name): one.name for one in fields(self.defaults[group])}

    def signature(self) -> Signature:
        """The signature of the function with single settings in the place of groups."""
        whole = inspect.signature(self.build)
        found: list[Parameter] = []
        for name, parameter in whole.parameters.items():
            if name not in self.defaults:
                found.append(parameter)
                continue
            group: object = self.defaults[name]
            hints = get_type_hints(type(group), include_extras=True)
            found += [
                Parameter(key, Parameter.KEYWORD_ONLY, default=getattr(group, own), annotation=hints[own])
                for key, own in self.settings(name).items()
            ]
        return whole.replace(parameters=found)

    def spread(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Single settings from settings and groups; a group is its dataclass or a table.

        Raises:
            UserError: A setting is given by itself and in a group, a group has no such setting, or it is no table.
        """
        found = dict(given)
        for name, group in self.defaults.items():
            own, value = self.settings(name), given.get(name)
            if isinstance(value, type(group)):
                inside = {key: getattr(value, own[key]) for key in own}
            elif isinstance(value, Mapping):
                inside = {_setting(name, key, own): one for key, one in cast(Mapping[str, Any], value).items()}
            elif name in given and name not in own:
                some = ", ".join(own.values())
                raise UserError(f"method.{name} is a group: give a table of its settings ({some}), not {quoted(value)}")
            else:
                continue
            found.pop(name)
            for key in inside:
                if key in found:
                    raise UserError(
                        f"method.{key} is given twice, by itself and in method.{name}; leave one of them out"
                    )
            found |= inside
        return found

    def gathered(self, single: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the function from all its single settings."""
        rest = dict(single)
        groups = {
            name: type(group)(**{own: rest.pop(key) for key, own in self.settings(name).items()})
            for name, group in self.defaults.items()
        }
        return rest | groups


def _setting(group: str, key: str, own: Mapping[str, str]) -> str:
    """The setting that a key of a group's table is."""
    names = {field: setting for setting, field in own.items()}
    if key not in names:
        raise UserError(f"method.{group} has no setting '{key}'; {did_you_mean(str(key), names)}")
    return names[key]
