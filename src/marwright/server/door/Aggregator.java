package marwright;

import java.util.List;
import java.util.concurrent.ExecutionException;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.messages.BaseModelRequest;
import org.pytorch.serve.util.messages.ModelWorkerResponse;
import org.pytorch.serve.wlm.BatchAggregator;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.WorkerState;

/**
 * Comes where TorchServe makes what gathers requests for a worker
 * (org.pytorch.serve.wlm.WorkLoadManager), and as what its other aggregators extend. When a worker's
 * connection ends, because it died or is taken away, its thread is interrupted. Where that thread
 * has taken a request from the queue and waits for more, TorchServe drops what it holds, and nobody
 * answers; here it is answered.
 *
 * <p>One thread at a time touches what is held, so that nothing is answered twice: whoever ends a
 * worker puts its requests back while its thread wakes up.
 */
public class Aggregator extends BatchAggregator {
    private static final int UNAVAILABLE = 503; // it was not begun, and may go to another worker

    public Aggregator() {}

    public Aggregator(Model model) {
        super(model);
    }

    @Override
    public BaseModelRequest getRequest(String worker, WorkerState state)
            throws InterruptedException, ExecutionException {
        try {
            BaseModelRequest request = super.getRequest(worker, state);
            if (Thread.interrupted()) { // while nothing waited: there is no worker to send it to
                throw new InterruptedException();
            }
            return request;
        } catch (Throwable exc) {
            refuse();
            throw exc;
        }
    }

    private synchronized void refuse() {
        List<Job> held = List.copyOf(jobs.values());
        jobs.clear();
        for (Job job : held) {
            try {
                job.sendError(UNAVAILABLE, "The worker ended before it began with the request.");
            } catch (RuntimeException exc) { // the others still have to hear of it
                Settings.LOG.warn("an answer was dropped: {}", exc.toString());
            }
        }
    }

    @Override
    public synchronized boolean sendResponse(ModelWorkerResponse response) {
        return super.sendResponse(response);
    }

    @Override
    public synchronized void sendError(BaseModelRequest request, String text, int status) {
        super.sendError(request, text, status);
    }

    @Override
    public synchronized void cleanJobs() {
        super.cleanJobs();
    }
}
