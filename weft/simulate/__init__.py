"""What programs will take: tables of costs, a catalogue of hardware, and a simulator. No torch."""
