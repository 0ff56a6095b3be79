"""The application: routes, who may use them, and what surrounds them."""

from __future__ import annotations

from fastapi import Depends, FastAPI

from app.error_handlers import add_error_handlers
from app.keys import KeyRing, require_admin_key, require_key
from app.middleware import add_middleware
from app.openapi import describe
from app.page import page_router
from app.rate_limit import limit_rate
from app.routes import admin_router, call_router, probe_router
from app.service import Service
from app.settings import Settings
from rlhf import __version__


def create_app(settings: Settings, service: Service) -> FastAPI:
    """The ASGI application over a service, which whoever serves it loads. Raises ConfigError for unusable keys."""
    app = FastAPI(
        title="RLHF summarizer",
        version=__version__,
        description="Summaries by a policy that was aligned with human preferences, and the reward model's scores.",
        docs_url=None,
        redoc_url=None,
    )
    keys = KeyRing(settings.api_keys_file) if settings.api_keys_file else None
    admin_keys = KeyRing(settings.admin_keys_file) if settings.admin_keys_file else None
    callers = [Depends(require_key(keys)), Depends(limit_rate(settings.rate_limit_per_minute))]
    app.include_router(call_router(service), dependencies=callers)
    app.include_router(admin_router(service), dependencies=[Depends(require_admin_key(admin_keys))])
    app.include_router(probe_router(service))
    app.include_router(page_router())
    add_error_handlers(app, service.metrics)
    add_middleware(app, settings, service.metrics, service.tracer)
    describe(app)
    return app
