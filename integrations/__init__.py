"""Adapters for PaddleSeg and PaddleDetection: docs/integrations.md."""
