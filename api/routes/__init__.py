"""The gateway's routes, one module for each kind of thing."""

from fastapi import APIRouter

from api.routes import audit, commands, devices, enrollment, events, health, keys, telemetry, tokens

ROUTERS: tuple[APIRouter, ...] = (
    commands.router,  # first those that are asked for most: they are looked through in this order
    telemetry.router,
    devices.router,
    enrollment.router,
    keys.router,
    events.router,
    tokens.router,
    audit.router,
    health.router,
)
