"""Sets on a Dask cluster: the only package that imports ``distributed``.

Dask brings the connections, the hosts' coming and going, the resource that keeps it at one build
a host, and the dashboard. ``connection`` speaks with the scheduler, ``dispatch`` decides which set
goes where, ``worker`` is what runs on a host.
"""

from farm.engines.dask.connection import RESOURCE, cluster
from farm.engines.dask.dispatch import Dispatcher

__all__ = ["RESOURCE", "Dispatcher", "cluster"]
