"""What the server counts, in Prometheus' form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unitok.serve.engine import Engine


class Metrics:
    """Counters of a server, and what its engine is doing."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = Counter("unitok_requests", "Answered requests", ["endpoint", "status"], registry=self.registry)
        self.first = Histogram(
            "unitok_first_token_seconds", "Seconds from a request to its first token", registry=self.registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )  # fmt: skip
        gauges = {
            "unitok_outputs_running": ("Outputs that are being generated", lambda: len(engine.running)),
            "unitok_outputs_waiting": ("Outputs that wait for a slot", lambda: len(engine.waiting)),
            "unitok_generated_tokens": ("Tokens generated since the start", lambda: engine.tokens),
            "unitok_steps": ("Steps of the decoder since the start", lambda: engine.steps),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

    def answered(self, route: object, status: int) -> None:
        """Count an answered request. route: of the framework; None where there is none."""
        self.requests.labels(getattr(route, "path", "other"), str(status)).inc()

    def text(self) -> bytes:
        """Return all values as Prometheus reads them."""
        return generate_latest(self.registry)
