"""Who may enter, and in what order the cluster is asked."""

from router.admission.fifo import AdmissionQueue as AdmissionQueue
