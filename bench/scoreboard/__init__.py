"""Defences against backdoored networks, compared on one set of networks, images and rules."""
