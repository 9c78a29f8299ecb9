"""POST /admin/models/load and /unload: only with --admin-key-file, and only with one of its keys."""

from __future__ import annotations

from octavo.server.exchange import Exchange
from octavo.server.schema import AdminRequest, read
from octavo.server.service import Service


async def load(service: Service, exchange: Exchange) -> None:
    """Answers when the model is loaded."""
    values, _ = await exchange.json()
    request, _ = read(AdminRequest, values)
    served = service.models.find(request.model)

    async def work() -> None:
        async with service.models.use(served.name, service.settings.queue_seconds):
            pass
        await exchange.send_json(200, {"model": served.name, "state": service.models.state(served.name)})

    await exchange.answer(work())


async def unload(service: Service, exchange: Exchange) -> None:
    """409 where it is answering someone."""
    values, _ = await exchange.json()
    request, _ = read(AdminRequest, values)
    served = service.models.find(request.model)
    await service.models.unload(served.name)
    await exchange.send_json(200, {"model": served.name, "state": service.models.state(served.name)})
