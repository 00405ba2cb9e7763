"""The four stages: each reads a directory, trains, and publishes a model directory."""

from common.program.signals import end_until_begun

end_until_begun()
