"""All checks that ship, imported in the order in which they run."""

import launch.doctor.versions  # isort: skip
import launch.doctor.devices  # isort: skip
import launch.doctor.collectives  # isort: skip
import launch.doctor.clocks  # isort: skip
import launch.doctor.limits  # isort: skip
import launch.doctor.disk  # isort: skip
import launch.doctor.sources  # isort: skip
import launch.doctor.order  # isort: skip
import launch.doctor.tokenizer  # isort: skip
import launch.doctor.memory  # isort: skip  # noqa: F401
