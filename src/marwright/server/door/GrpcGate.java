package marwright;

import io.grpc.ForwardingServerCallListener.SimpleForwardingServerCallListener;
import io.grpc.Metadata;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.Status;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.Set;
import org.pytorch.serve.archive.model.ModelVersionNotFoundException;
import org.pytorch.serve.grpc.inference.PredictionsRequest;
import org.pytorch.serve.grpcimpl.GRPCInterceptor;
import org.pytorch.serve.util.ConnectorType;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;

/**
 * Comes where TorchServe makes the interceptor of its gRPC servers (org.pytorch.serve.ModelServer),
 * does what that one does, and then refuses what it lets through: changes of models without the
 * key, and sequences for models that know none, over which TorchServe stumbles.
 */
public final class GrpcGate extends GRPCInterceptor {
    private static final Metadata.Key<String> KEY =
            Metadata.Key.of("x-marwright-key", Metadata.ASCII_STRING_MARSHALLER);

    private static final String MANAGEMENT = "org.pytorch.serve.grpc.management.";
    /** All else of the management service takes the key, so that no call is forgotten. */
    private static final Set<String> READS = Set.of("DescribeModel", "ListModels");

    private static final String SEQUENCES =
            "org.pytorch.serve.grpc.inference.InferenceAPIsService/StreamPredictions2";

    public GrpcGate(ConnectorType connector) {
        super(connector);
    }

    @Override
    public <Q, A> ServerCall.Listener<Q> interceptCall(
            ServerCall<Q, A> call, Metadata headers, ServerCallHandler<Q, A> next) {
        return super.interceptCall(call, headers, (admitted, said) -> admit(admitted, said, next));
    }

    private static <Q, A> ServerCall.Listener<Q> admit(
            ServerCall<Q, A> call, Metadata headers, ServerCallHandler<Q, A> next) {
        String name = call.getMethodDescriptor().getFullMethodName();
        if (Settings.KEY_FILE != null && isChange(name) && !hasKey(headers)) {
            call.close(Status.PERMISSION_DENIED.withDescription(
                    "This server's models are what its deployment says: change that, or use"
                            + " marwright's clients, which send the key (x-marwright-key)"),
                    new Metadata());
            return new ServerCall.Listener<Q>() {};
        }
        headers.discardAll(KEY);
        ServerCall.Listener<Q> listener = next.startCall(call, headers);
        return name.equals(SEQUENCES) ? new SequenceListener<>(call, listener) : listener;
    }

    private static boolean isChange(String name) {
        return name.startsWith(MANAGEMENT) && !READS.contains(name.substring(name.indexOf('/') + 1));
    }

    private static boolean hasKey(Metadata headers) {
        String said = headers.get(KEY);
        byte[] key = (said == null ? "" : said).getBytes(StandardCharsets.UTF_8);
        return key.length > 0 && MessageDigest.isEqual(key, Settings.Key.VALUE);
    }

    /** Ends a sequence at its first input that no sequence can have. */
    private static final class SequenceListener<Q> extends SimpleForwardingServerCallListener<Q> {
        private final ServerCall<Q, ?> call;
        private boolean refused;

        SequenceListener(ServerCall<Q, ?> call, ServerCall.Listener<Q> listener) {
            super(listener);
            this.call = call;
        }

        @Override
        public void onMessage(Q message) {
            Status reason = refused ? null : examine((PredictionsRequest) message);
            if (reason != null) {
                refused = true;
                call.close(reason, new Metadata());
            } else if (!refused) {
                super.onMessage(message);
            }
        }

        @Override
        public void onHalfClose() {
            if (!refused) { // TorchServe would complete what has ended
                super.onHalfClose();
            }
        }

        private static Status examine(PredictionsRequest request) {
            String name = request.getModelName();
            String version = request.getModelVersion();
            if (name.isEmpty()) {
                return null; // TorchServe says so itself
            }
            try {
                Model model = ModelManager.getInstance().getModel(
                        name, version.isEmpty() ? null : version);
                if (model == null) {
                    return Status.NOT_FOUND.withDescription("Model not found: " + name);
                }
                return model.isSequenceBatching() ? null
                        : Status.FAILED_PRECONDITION.withDescription("The model " + name
                                + " is not configured for sequences: call Predictions or"
                                + " StreamPredictions");
            } catch (ModelVersionNotFoundException exc) {
                return null; // likewise
            }
        }
    }
}
