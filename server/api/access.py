"""What a caller may use and see: the one place where names of models meet keys.

A model that a key may not use is not there for it: it is refused in the words for a name that nothing has,
before anything is looked up, so neither the answer nor the time it takes tells whether it exists. Routes that
list or show models go through `usable_adapters` and `find_adapter`.

A name alone may also be a place elsewhere, where it means another adapter, and anybody's. So for a key that
is limited to some adapters a name means one of this server's, unless the request says from where; and then
the key must have it with its source, as in `hub:org/*`.
"""

from dataclasses import replace

from adapters.types import AdapterInfo
from server.api.caller import Caller
from server.api.names import adapter_name, without_base
from server.api.ports import Service
from server.inferless.apps import Apps
from server.inferless.worker import AppWorker
from server.wishes import AdapterWish

LOCAL = "local"  # the source whose adapters the names of this server mean


def usable_wish(
    name: str | None, wish: AdapterWish, service: Service, caller: Caller
) -> tuple[str | None, AdapterWish]:
    """The same with the adapters' own names and the source they may come from; the name is None where the
    wish stands in its place.

    Raises: what `Service.resolve` raises for an unknown name, if the caller may not use all that is meant.
    """

    if wish.source is None and caller.adapters is not None:
        wish = replace(wish, source=LOCAL)

    def own(asked: str, param: str) -> str:
        return _usable_adapter(asked, service, caller, wish.source, param)

    if wish.parts:
        parts = tuple(replace(part, name=own(part.name, part.param)) for part in wish.parts)
        if not any(part.scale for part in parts):
            usable_name(None, service, caller)  # nothing is left but the base
        return None, replace(wish, parts=parts)
    if wish.merge is not None:
        named = enumerate(wish.merge.names)
        names = tuple(own(asked, f"{wish.merge.param}.ids[{i}]") for i, asked in named)
        return None, replace(wish, merge=replace(wish.merge, names=names))
    return usable_name(name, service, caller, wish.source), wish


def usable_name(name: str | None, service: Service, caller: Caller, source: str | None = None) -> str | None:
    """The own name of the adapter that a client means by `name`, None for the base model.

    Raises: what `Service.resolve` raises for an unknown name, if the caller may not use what it means.
    """
    if service.card.is_base(name):
        if caller.may_use(None):
            return None
        raise service.unknown(name or service.card.id)
    assert name is not None, "no name means the base model"
    return _usable_adapter(name, service, caller, source, "model")


def _usable_adapter(name: str, service: Service, caller: Caller, source: str | None, param: str) -> str:
    is_remote = source not in (None, LOCAL)
    own = name if is_remote else adapter_name(name, service)
    if not caller.may_use(f"{source}:{own.removeprefix(f'{source}:')}" if is_remote else own):
        raise service.unknown(own if is_remote else without_base(name, service.card), param)
    return own


def usable_adapters(service: Service, caller: Caller) -> tuple[AdapterInfo, ...]:
    """The registered adapters that the caller may use, sorted by name."""
    known = service.registry.list()
    if not caller.is_limited:
        return known
    return tuple(info for info in known if caller.may_use(info.ref.name))


def find_adapter(name: str, service: Service, caller: Caller) -> AdapterInfo | None:
    """The registered adapter that a client means by `name`, if the caller may use it."""
    info = service.registry.get(adapter_name(name, service))
    return info if info is not None and caller.may_use(info.ref.name) else None


def find_app(name: str, apps: Apps, caller: Caller) -> AppWorker | None:
    """The Inferless app of this name, if the caller may use it. A key's `adapters=` holds for apps, too."""
    return apps.get(name) if caller.may_use(name) else None
