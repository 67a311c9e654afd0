"""The routes, one module an area: each has `add_routes(app, services)`. What they take is in `protocol`, the wording of
their answers in `replies`."""
