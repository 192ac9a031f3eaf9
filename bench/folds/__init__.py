"""The method on attacks and networks that its constants and weights were not fitted on."""
