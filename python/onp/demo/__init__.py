"""What the demo needs: the generator of its images and its backdoored checkpoint."""
