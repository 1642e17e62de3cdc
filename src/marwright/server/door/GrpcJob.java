package marwright;

import com.google.rpc.Status;
import io.grpc.stub.StreamObserver;
import java.util.HashMap;
import java.util.Map;
import org.pytorch.serve.grpc.inference.PredictionResponse;
import org.pytorch.serve.job.GRPCJob;
import org.pytorch.serve.util.GRPCUtils;
import org.pytorch.serve.util.messages.RequestInput;
import org.pytorch.serve.util.messages.WorkerCommands;

/**
 * Comes where TorchServe makes the job for a prediction over gRPC
 * (org.pytorch.serve.grpcimpl.InferenceImpl). What TorchServe's own throws while it answers ends
 * the thread of the worker that computed the answer; this one throws nothing.
 */
public final class GrpcJob extends GRPCJob {
    /** The header in which a worker says whether further parts of an answer follow. */
    private static final String NEXT = "ts_stream_next";

    /** The last line of TorchServe's own errors. */
    private static final String ERROR = "org.pytorch.serve.http.InternalServerException";

    private final StreamObserver<PredictionResponse> observer;
    private volatile boolean failed; // what else the worker sends, nobody waits for

    public GrpcJob(
            StreamObserver<PredictionResponse> observer,
            String model,
            String version,
            WorkerCommands command,
            RequestInput input) {
        super(observer, model, version, command, input);
        this.observer = observer;
    }

    @Override
    public void response(
            byte[] body, CharSequence type, int status, String phrase, Map<String, String> headers) {
        Map<String, String> said = headers == null ? new HashMap<>() : new HashMap<>(headers);
        if (getCmd() == WorkerCommands.STREAMPREDICT) {
            said.putIfAbsent(NEXT, "false"); // an answer that comes whole is the last part
        }
        if (failed) {
            return;
        }
        if (getCmd() == WorkerCommands.PREDICT && "true".equals(said.get(NEXT))) {
            fail(io.grpc.Status.FAILED_PRECONDITION.withDescription(
                    "The handler answers in parts: call StreamPredictions"));
            return;
        }
        try {
            super.response(body, type, status, phrase, said);
        } catch (RuntimeException exc) {
            drop(exc);
        }
    }

    @Override
    public void sendError(int status, String text) {
        if (failed) {
            return;
        }
        try {
            if (getCmd() == WorkerCommands.STREAMPREDICT2) {
                int code = GRPCUtils.getGRPCStatusCode(status).getCode().value();
                Status reason = Status.newBuilder()
                        .setCode(code).setMessage(text + "\n" + ERROR).build();
                observer.onNext(PredictionResponse.newBuilder().setStatus(reason).build());
            } else {
                super.sendError(status, text);
            }
        } catch (RuntimeException exc) {
            drop(exc);
        }
    }

    @Override
    public boolean isOpen() {
        return !failed && super.isOpen();
    }

    /** The client went, or ended its sequence before the answers were there. */
    private void drop(RuntimeException exc) {
        Settings.LOG.warn("an answer over gRPC was dropped: {}", exc.toString());
        fail(io.grpc.Status.INTERNAL.withDescription("The answer could not be sent"));
    }

    private void fail(io.grpc.Status reason) {
        failed = true;
        try {
            observer.onError(reason.asRuntimeException());
        } catch (RuntimeException exc) {
            Settings.LOG.debug("the call had ended: {}", exc.toString());
        }
    }
}
